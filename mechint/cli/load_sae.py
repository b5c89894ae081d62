"""`mechint load-sae NAME`: download an SAE, check it, open it, and say what it is."""

from collections.abc import Sequence

from mechint.cli.flags import command, parse, print_json
from mechint.cli.registry_table import shown
from mechint.config.registry import LoadSaeConfig


@command
def main(argv: Sequence[str]) -> int:
    config = parse(LoadSaeConfig, argv, prog="mechint load-sae")
    from mechint.provenance import detect_device
    from mechint.sae.load import open_pretrained_sae

    device = detect_device(config.device)
    opened = open_pretrained_sae(
        config.name, revision=config.revision, cache_dir=config.cache_dir, registry=config.registry
    )
    sae = opened.sae.to(device)
    if config.json:
        print_json({**opened.config, "verified": opened.verified})
        return 0
    for key, value in opened.config.items():
        absent = "none" if key == "k" else "not stated"  # most architectures have no k
        print(f"{key}: {absent if value is None else shown(value)}")
    print(f"parameters: {sum(p.numel() for p in sae.parameters())}")
    for name, sha256 in opened.verified.items():
        print(f"verified: {shown(name)}  sha256 {sha256}")
    if not opened.verified:
        print("verified: nothing; no bundle_metadata.json states the hashes of these files")
    return 0
