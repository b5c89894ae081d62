"""`mechint verify RUN`: the hash chain of a run, from texts to numbers."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from mechint.cli.flags import command, parse
from mechint.config import Config
from mechint.errors import MechintError


@dataclass(frozen=True)
class VerifyConfig(Config):
    """Check a run's files, and the activations it was trained on, against the hashes in its manifest."""

    run_dir: tyro.conf.Positional[Path]
    """The run directory."""


@command
def main(argv: Sequence[str]) -> int:
    config = parse(VerifyConfig, argv, prog="mechint verify")
    from mechint.runs import Run, verify

    run = Run(config.run_dir)
    if not run.is_done:
        raise MechintError(
            f"{run.path} has no manifest.json: its training is not finished; go on with"
            f" `python scripts/train_sae.py --resume {run.path}`"
        )
    links = verify(run)
    for what, verdict in links:
        print(f"{verdict:<12}  {what}")
    bad = [what for what, verdict in links if verdict in ("changed", "missing")]
    if bad:
        raise MechintError(f"{run.path} is not as its manifest says: {', '.join(bad)}")
    print(f"{run.path}: every recorded hash holds")
    return 0
