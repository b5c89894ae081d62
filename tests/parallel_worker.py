"""One of several processes: trains the configs of a JSON list one after the other, joined anew for each.

`RANK`, `WORLD_SIZE`, `MASTER_ADDR` and `MASTER_PORT` are in the environment, as torchrun sets them.
"""

import contextlib
import json
import sys
from pathlib import Path

from shapes import check_shapes

check_shapes("mechint")

from small_run import in_float64  # noqa: E402

from mechint.config import SAETrainConfig  # noqa: E402
from mechint.train import train  # noqa: E402


def main(jobs: Path) -> None:
    for settings in json.loads(jobs.read_text()):
        # auto: kernels that are there for float32 alone
        with contextlib.nullcontext() if settings["kernel"] == "auto" else in_float64():
            train(SAETrainConfig.from_dict(settings), progress=False)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
