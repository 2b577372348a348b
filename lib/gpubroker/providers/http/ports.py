"""A pod's ports as a short text in a label, for vendors that do not tell later what was asked for; and where they are reached."""

import re
from collections.abc import Iterator, Mapping
from typing import Final

from gpubroker.providers.base import Endpoint, Spec

SSH: Final = 22
"""On a machine it is the machine's own: a pod's port 22 is not taken from it."""
_PROTOCOLS: Final[Mapping[str, str]] = {"h": "http", "t": "tcp", "u": "udp"}
_PORT: Final = re.compile(r"(\d{1,5})([htu])")


def write(spec: Spec) -> str:
    """The ports and, with a key, ssh, as `8000h-9000t-53u-22t`: at most 115 characters; empty where there are none."""
    ports = {port.port: port.protocol for port in spec.ports}
    if spec.ssh_public_key:
        ports[SSH] = "tcp"
    return "-".join(f"{port}{protocol[0]}" for port, protocol in ports.items())


def read(
    text: str, host: str, user: str, ssh_port: int = SSH, outside: Mapping[int, int] | None = None
) -> Iterator[Endpoint]:
    """The endpoints of what `write` wrote. A port is reached at the same number but where `outside` says another."""
    for number, letter in _PORT.findall(text):
        port, protocol = int(number), _PROTOCOLS[letter]
        if port == SSH:
            way = f"ssh {user}@{host}" + (f" -p {ssh_port}" if ssh_port != SSH else "")
            yield Endpoint("ssh", port, "tcp", host, ssh_port, command=way)
            continue
        external = (outside or {}).get(port, port)
        url = f"http://{host}:{external}" if protocol == "http" else None
        yield Endpoint(f"{protocol}-{port}", port, protocol, host, external, url)
