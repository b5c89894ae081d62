"""`mechint list-saes`: the SAEs that have a name."""

from collections.abc import Sequence

from mechint.cli.flags import command, parse
from mechint.cli.registry_table import PLACES, print_entries, print_table
from mechint.config.registry import ListConfig


@command
def main(argv: Sequence[str]) -> int:
    config = parse(
        ListConfig, argv, prog="mechint list-saes", description="List the SAEs that registries name." + PLACES
    )
    from mechint.huggingface.registry import sae_registry, source_in_words

    known = sae_registry(config.registry)
    if config.json:
        print_entries(known)
        return 0
    rows = []
    for sae in known.values():
        said = sae.config
        width = f"{said.get('n_features', '?')} x {said.get('input_dim', '?')}"
        k = "" if said.get("k") is None else str(said["k"])
        hook, model = str(said.get("hook_site") or ""), str(said.get("model_name") or "")
        rows.append([sae.name, model, hook, width, k, sae.license, source_in_words(sae)])
    print_table("SAEs", ["Name", "Model", "Hook site", "Latents x width", "k", "License", "Source"], rows)
    return 0
