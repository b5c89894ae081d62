"""`scripts/export_sae.py --run-dir runs/x --format saelens`: a run's SAE for another tool."""

from collections.abc import Sequence

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
    certificate, path = convert(
        run.checkpoint_path, output, to=target.name, from_format="mechint", overwrite=config.overwrite
    )
    print(f"output: {output}")
    print(f"certificate: {path}")
    print(f"encode_difference: {certificate.encode_difference:.2e}  (relative, {certificate.n_probes} probes)")
    print(f"decode_difference: {certificate.decode_difference:.2e}")
    return 0
