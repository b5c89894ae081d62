"""`mechint apply-steering`: baseline beside steered text, with a published vector."""

import sys
from collections.abc import Sequence

from mechint.cli.flags import command, parse
from mechint.cli.registry_table import shown
from mechint.config.registry import ApplySteeringConfig


@command
def main(argv: Sequence[str]) -> int:
    config = parse(ApplySteeringConfig, argv, prog="mechint apply-steering")
    from mechint.hub.apply import apply_steering
    from mechint.steering import beside

    done = apply_steering(config, on_note=lambda note: print(f"note: {note}", file=sys.stderr))
    said = done.metadata
    model = config.model or said["model_name"]
    print(f"vector: {shown(said['name'])}  model: {shown(model)}  hook: {shown(said['hook_site'])}")
    print(f"unit: {done.scale:.4g} activation units a coefficient ({config.unit})")
    print()
    print("\n\n".join(beside(row, layout=config.layout) for row in done.results))
    return 0
