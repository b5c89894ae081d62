"""`scripts/export_sae.py --run-dir runs/x --format saelens`: a run's SAE for another tool."""

from collections.abc import Sequence

from mechint.cli.convert import print_proof
from mechint.cli.flags import command, parse
from mechint.config.formats import ExportConfig


@command
def main(argv: Sequence[str]) -> int:
    config = parse(ExportConfig, argv, prog="export_sae.py")
    from mechint.formats.convert import convert, find_format
    from mechint.runs import Run

    target = find_format(config.format, to=True)
    run = Run(config.run_dir)
    output = config.output or run.path / "exports" / target.name
    choices = {"overwrite": config.overwrite, "pad": config.pad_topk}
    done = convert(run.checkpoint_path, output, to=target.name, from_format="mechint", **choices)
    print_proof(output, *done)
    return 0
