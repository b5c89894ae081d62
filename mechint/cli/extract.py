"""`mechint extract-steering`, `scripts/extract_steering.py`: a steering direction from prompts or from a latent."""

import sys
from collections.abc import Sequence

from mechint.cli.flags import command, parse
from mechint.config import ExtractConfig


@command
def main(argv: Sequence[str]) -> int:
    config = parse(ExtractConfig, argv, prog="extract_steering.py")
    from mechint.steering import extract

    done = extract(config, on_note=lambda note: print(f"note: {note}", file=sys.stderr))
    info = done.direction.info
    print(f"direction: {done.path}")
    print(f"model: {info['model']}  hook: {info['hook_site']}  width: {info['hidden_dim']}")
    print(f"direction_norm: {info['direction_norm']:.4g}  (before it was divided by it)")
    if info.get("mean_activation_norm") is not None:
        print(f"mean_activation_norm: {info['mean_activation_norm']:.4g}  (the unit of a coefficient)")
    if info.get("extraction_quality") is not None:
        counts = ", ".join(f"{info[f'{name}_prompt_count']} {name}" for name in info["mean_projections"])
        print(f"extraction_quality: {info['extraction_quality']:.3f}  ({counts} prompts)")
    if info.get("heldout_accuracy") is not None:
        print(f"heldout_accuracy: {info['heldout_accuracy']:.3f}  (0.5 is chance)")
    return 0
