"""`gpubroker dev` in the folder that is named, which writes down when it calls the provider: a line of pod and time each."""

import sys
import time
from pathlib import Path

from gpubroker.local import dev
from gpubroker.providers import base
from gpubroker.providers.local import Local

CALLS = "calls"


def main(folder: Path) -> int:
    create = Local.create

    async def watched(self: Local, spec: base.Spec, offer: base.ProviderOffer, ref: str) -> base.Created:
        with (folder / CALLS).open("a") as calls:
            calls.write(f"{spec.pod_id} {time.time()}\n")
        return await create(self, spec, offer, ref)

    Local.create = watched
    return dev.run(folder, "127.0.0.1", 0, end_pods=True, as_json=True)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
