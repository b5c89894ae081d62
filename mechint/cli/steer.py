"""`mechint steer`, `scripts/steer.py`: baseline beside steered text."""

import sys
from collections.abc import Sequence

from mechint.cli.flags import command, parse
from mechint.config import SteerConfig


@command
def main(argv: Sequence[str]) -> int:
    config = parse(SteerConfig, argv, prog="steer.py")
    from mechint.steering import beside, steer_texts

    done = steer_texts(config, on_note=lambda note: print(f"note: {note}", file=sys.stderr))
    print("\n\n".join(beside(row, layout=config.layout) for row in done.results))
    if done.output is not None:
        print(f"steer_output: {done.output}")
    return 0
