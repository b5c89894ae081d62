"""`mechint eval`, `scripts/eval_sae.py`: measure an SAE on held-out data."""

import sys
from collections.abc import Sequence

from mechint.cli.flags import command, parse
from mechint.config import EvalConfig
from mechint.errors import MechintError


@command
def main(argv: Sequence[str]) -> int:
    config = parse(EvalConfig, argv, prog="eval_sae.py")
    if config.run_dir is None and config.checkpoint is None:
        raise MechintError("Provide --checkpoint or --run-dir")
    from mechint.eval import evaluate_checkpoint, print_eval_summary, save_eval_summary

    summary = evaluate_checkpoint(config, progress=sys.stderr.isatty())
    for note in summary["notes"]:
        print(f"note: {note}", file=sys.stderr)
    print_eval_summary(summary)
    if config.output is not None:
        save_eval_summary(summary, config.output, overwrite=config.overwrite)
        print(f"eval_output: {config.output}")
    return 0
