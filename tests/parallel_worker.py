"""One of several processes: trains the configs of a JSON list one after the other, joined anew for each.

`RANK`, `WORLD_SIZE`, `MASTER_ADDR` and `MASTER_PORT` are in the environment, as torchrun sets them.
"""

import contextlib
import json
import sys
from pathlib import Path

from jaxtyping import install_import_hook

with install_import_hook("mechint", "beartype.beartype"):
    from small_run import in_float64

    from mechint.config import SAETrainConfig
    from mechint.train import train


def main(jobs: Path) -> None:
    for settings in json.loads(jobs.read_text()):
        # auto: kernels that are there for float32 alone
        with contextlib.nullcontext() if settings["kernel"] == "auto" else in_float64():
            train(SAETrainConfig.from_dict(settings), progress=False)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
