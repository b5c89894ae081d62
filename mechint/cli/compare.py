"""`mechint compare`, `scripts/compare_expansions.py`: match the latents of checkpoints."""

from collections.abc import Sequence

from mechint.cli.flags import command, parse
from mechint.config import CompareConfig


@command
def main(argv: Sequence[str]) -> int:
    config = parse(CompareConfig, argv, prog="compare_expansions.py")
    from mechint.compare import compare_all

    found = compare_all(config)
    print(f"comparison_output: {config.output}")
    print(found.text())
    return 0
