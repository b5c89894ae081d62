"""`mechint convert SRC DST --to FORMAT`: an SAE in another tool's format, with a certificate."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mechint.cli.flags import command, parse
from mechint.config.formats import ConvertConfig

if TYPE_CHECKING:
    from mechint.formats.certificate import Certificate


@command
def main(argv: Sequence[str]) -> int:
    config = parse(ConvertConfig, argv, prog="mechint convert")
    from mechint.formats.convert import convert_each

    done = convert_each(
        config.source,
        config.output,
        to=config.to,
        from_format=config.from_format,
        overwrite=config.overwrite,
        pad=config.pad_topk,
        n_probes=config.n_probes,
        seed=config.seed,
    )
    for output, (certificate, path) in done.items():
        print_proof(output, certificate, path)
    return 0


def print_proof(output: Path, certificate: "Certificate", path: Path) -> None:
    """What a conversion wrote, how it is proved, and what its reader should know."""
    from mechint.provenance import read_json

    print(f"output: {output}")
    print(f"certificate: {path}")
    print(f"folded: {', '.join(certificate.folded) or 'nothing'}")
    if certificate.added_latents:
        print(f"added_latents: {certificate.added_latents}  (of zeros, at the end)")
    print(f"encode_difference: {certificate.encode_difference:.2e}  (relative, {certificate.n_probes} probes)")
    print(f"decode_difference: {certificate.decode_difference:.2e}")
    for note in read_json(path, "certificate")["notes"]:
        print(f"note: {note}")
