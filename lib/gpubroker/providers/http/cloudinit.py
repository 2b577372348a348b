"""What a new virtual machine does at its first boot: run the pod's image in Docker, and power off at the hard stop.

What the container is made of is sent to Docker's own interface from a file that root alone reads: no value is in a command line,
none is changed by a shell. The program runs anew at each boot, in the same container. Powering off ends what the pod does, not
what a vendor bills: terminating does that.

Sources: the Docker Engine API (`/images/create`, `/containers/create`), NVIDIA's container toolkit, cloud-init's modules
`write_files`, `runcmd`, `ssh_authorized_keys`.
"""

import base64
import json
from typing import Any, Final, NamedTuple
from urllib.parse import quote

from gpubroker.errors import Rejected
from gpubroker.providers.base import Spec
from gpubroker.providers.http import ports

_FOLDER: Final = "/etc/gpubroker"
_UNITS: Final = "/etc/systemd/system"
_PROGRAMS: Final = "/usr/local/sbin"
_UNIT: Final = """\
[Unit]
Description={what}
Wants=network-online.target
After=network-online.target docker.service
[Service]
{service}
[Install]
WantedBy=multi-user.target
"""
_POD_SERVICE: Final = f"""\
Type=oneshot
RemainAfterExit=yes
ExecStart={_PROGRAMS}/gpubroker-pod
Restart=on-failure
RestartSec=15
TimeoutStartSec=infinity"""
_WATCHDOG_SERVICE: Final = f"""\
ExecStart={_PROGRAMS}/gpubroker-watchdog
Restart=always
RestartSec=10"""
_WATCHDOG: Final = """\
#!/bin/sh
# Powers this machine off at the pod's hard stop, also after a reboot, whoever else is dead by then.
while [ "$(date +%s)" -lt {at} ]; do sleep 10; done
systemctl poweroff
"""
_START: Final = """\
#!/bin/bash
# Starts the pod's container. At the first boot it makes it, and installs what is missing.
set -euo pipefail
export DEBIAN_FRONTEND=noninteractive
engine() { curl --silent --show-error --fail --unix-socket /run/docker.sock "$@"; }
add() { apt-get -qq -o DPkg::Lock::Timeout=600 update && apt-get -qq -o DPkg::Lock::Timeout=600 install -y "$@"; }
has() { command -v "$1" > /dev/null; }
has curl || add curl ca-certificates
has docker || add docker.io
"""
_TOOLKIT: Final = """\
if ! has nvidia-ctk; then
  add nvidia-container-toolkit || {
    has gpg || add gnupg
    key=/usr/share/keyrings/nvidia-container-toolkit-keyring.gpg
    curl -fsSL https://nvidia.github.io/libnvidia-container/gpgkey | gpg --dearmor --yes -o "$key"
    curl -fsSL https://nvidia.github.io/libnvidia-container/stable/deb/nvidia-container-toolkit.list |
      sed "s#deb https://#deb [signed-by=$key] https://#" > /etc/apt/sources.list.d/nvidia-container-toolkit.list
    add nvidia-container-toolkit
  }
  nvidia-ctk runtime configure --runtime=docker
  systemctl restart docker
fi
"""
_RUN: Final = """\
systemctl start docker
if ! engine http://docker/containers/pod/json > /dev/null 2>&1; then
  engine -X POST{login} 'http://docker/images/create?fromImage={image}' | tail -n 1
  engine -H 'Content-Type: application/json' --data-binary @{folder}/container.json \\
    'http://docker/containers/create?name=pod'
fi
engine -X POST http://docker/containers/pod/start
"""
_COMMANDS: Final = (
    "systemctl daemon-reload",
    "systemctl enable --now gpubroker-watchdog.service",
    "systemctl enable --now --no-block gpubroker-pod.service",
)
_LONGEST_WORD: Final = 1 << 20


class _File(NamedTuple):
    path: str
    permissions: str
    content: str


def write(spec: Spec, *, gpus: bool = True) -> str:
    """User data of the format `#cloud-config`, ASCII. `gpus`: the pod gets all that the machine has.

    Raises Rejected `image_needed` for a pod without an image.
    """
    config: dict[str, Any] = {"ssh_authorized_keys": [spec.ssh_public_key]} if spec.ssh_public_key else {}
    config["write_files"] = [file._asdict() for file in _files(spec, gpus=gpus)]
    config["runcmd"] = list(_COMMANDS)
    return "#cloud-config\n" + _dump(config)


def write_script(spec: Spec, *, gpus: bool = True) -> str:
    """The same as a script for root, for vendors whose machines run scripts only. The key of ssh is root's. Raises as `write`."""
    parts = ["#!/bin/bash\nset -eu\numask 077\n"]
    for path, permissions, content in _files(spec, gpus=gpus):
        parts.append(f"mkdir -p {path.rpartition('/')[0]}\ncat > {path} <<'end of gpubroker'\n{content.rstrip()}\n")
        parts.append(f"end of gpubroker\nchmod {permissions} {path}\n")
    if spec.ssh_public_key:
        key = base64.b64encode(spec.ssh_public_key.encode() + b"\n").decode()
        parts.append(f"mkdir -p /root/.ssh\necho {key} | base64 -d >> /root/.ssh/authorized_keys\n")
    return "".join(parts) + "\n".join(_COMMANDS) + "\n"


def _files(spec: Spec, *, gpus: bool) -> list[_File]:
    if spec.image is None:
        raise Rejected("image_needed", "a pod on a virtual machine needs an image", try_next_offer=False)
    image = spec.image if ":" in spec.image.rpartition("/")[2] or "@" in spec.image else f"{spec.image}:latest"
    login = f" -H @{_FOLDER}/registry" if spec.registry_auth else ""
    run = _RUN.format(login=login, image=quote(image, safe=""), folder=_FOLDER)
    files = [
        _File(f"{_FOLDER}/container.json", "0600", json.dumps(_container(spec, image, gpus=gpus)) + "\n"),
        _File(f"{_PROGRAMS}/gpubroker-pod", "0700", _START + (_TOOLKIT if gpus else "") + run),
        _File(f"{_PROGRAMS}/gpubroker-watchdog", "0700", _WATCHDOG.format(at=int(spec.hard_stop_at.timestamp()))),
        _File(f"{_UNITS}/gpubroker-pod.service", "0644", _UNIT.format(what="The pod", service=_POD_SERVICE)),
        _File(
            f"{_UNITS}/gpubroker-watchdog.service",
            "0644",
            _UNIT.format(what="The end of the pod", service=_WATCHDOG_SERVICE),
        ),
    ]
    if spec.registry_auth:
        login = base64.urlsafe_b64encode(json.dumps(dict(spec.registry_auth)).encode()).decode()
        files.append(_File(f"{_FOLDER}/registry", "0600", f"X-Registry-Auth: {login}\n"))
    return files


def _container(spec: Spec, image: str, *, gpus: bool) -> dict[str, Any]:
    """The body of `/containers/create`. `IpcMode` is the machine's, as frameworks want much shared memory."""
    names = [
        f"{port.port}/{'udp' if port.protocol == 'udp' else 'tcp'}" for port in spec.ports if port.port != ports.SSH
    ]
    body: dict[str, Any] = {
        "Image": image,
        "Env": [f"{name}={value}" for name, value in spec.env.items()],
        "ExposedPorts": {name: {} for name in names},
        "HostConfig": {
            "IpcMode": "host",
            "PortBindings": {name: [{"HostPort": name.partition("/")[0]}] for name in names},
            "DeviceRequests": [{"Count": -1, "Capabilities": [["gpu"]]}] if gpus else [],
        },
    }
    if spec.command:
        body["Cmd"] = list(spec.command)
    return body


def _dump(config: dict[str, Any]) -> str:
    """YAML, its files as blocks that a person can read."""
    import yaml  # noqa: PLC0415 - who rents a machine waits for it, not every tick that knows of this provider

    class Dumper(yaml.SafeDumper):
        """Of this text alone."""

    def represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
        return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)

    Dumper.add_representer(str, represent_text)
    return yaml.dump(config, Dumper=Dumper, sort_keys=False, width=_LONGEST_WORD)
