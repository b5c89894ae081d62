"""`mechint list-steering`: the steering vectors that have a name."""

from collections.abc import Sequence

from mechint.cli.flags import command, parse
from mechint.cli.registry_table import PLACES, print_entries, print_table
from mechint.config.registry import ListConfig


@command
def main(argv: Sequence[str]) -> int:
    config = parse(
        ListConfig,
        argv,
        prog="mechint list-steering",
        description="List the steering vectors that registries name." + PLACES,
    )
    from mechint.huggingface.registry import source_in_words, steering_registry

    known = steering_registry(config.registry)
    if config.json:
        print_entries(known)
        return 0
    rows = []
    for vector in known.values():
        norm = "" if vector.direction_norm is None else f"{vector.direction_norm:.2f}"
        source = source_in_words(vector)
        rows.append([vector.name, vector.model_name, vector.hook_site, norm, vector.license, source])
    print_table("Steering vectors", ["Name", "Model", "Hook site", "Raw norm", "License", "Source"], rows)
    return 0
