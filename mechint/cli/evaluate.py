"""`mechint eval`, `scripts/eval_sae.py`: measure an SAE on held-out data."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from mechint.cli.flags import command, parse
from mechint.config import EvalConfig
from mechint.errors import MechintError


@command
def main(argv: Sequence[str]) -> int:
    config = parse(EvalConfig, argv, prog="eval_sae.py")
    if not config.has_sae:
        raise MechintError("which SAE? Give it as the first argument, or Provide --checkpoint or --run-dir")
    from mechint.eval import evaluate_checkpoint, print_eval_summary, save_eval_summary
    from mechint.inside import named_sae

    config, note = with_output(named_sae(config))

    summary = evaluate_checkpoint(config, progress=sys.stderr.isatty())
    for text in (*summary["notes"], *([note] if note else [])):
        print(f"note: {text}", file=sys.stderr)
    print_eval_summary(summary)
    if config.output is not None:
        save_eval_summary(summary, config.output, overwrite=config.overwrite)
        print(f"eval_output: {config.output}")
    return 0


def with_output(config: EvalConfig) -> tuple[EvalConfig, str | None]:
    """The settings with the run's eval.json as the output where none is named, or a note why it is not written.

    Results are printed either way, so an eval.json that lies there already is no error unless it was asked for.
    """
    if config.output is not None or config.run_dir is None or not config.run_dir.is_dir():
        return config, None
    output = Path(config.run_dir) / "eval.json"
    if output.exists() and not config.overwrite:
        return config, f"{output} is left as it is: --overwrite replaces it, --output writes elsewhere"
    return dataclasses.replace(config, output=output), None
