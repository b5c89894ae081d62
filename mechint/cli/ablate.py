"""`mechint ablate`, `scripts/batch_ablate.py`: rank latents by the effect of removing each."""

import signal
import sys
from collections.abc import Sequence

from mechint.cli.flags import command, parse
from mechint.config import AblateConfig


@command
def main(argv: Sequence[str]) -> int:
    config = parse(AblateConfig, argv, prog="batch_ablate.py")
    from mechint.ablation import ablate, partial_path

    # `kill`, a batch system's time limit: end as at Ctrl-C
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        done = ablate(config, on_note=lambda note: print(f"note: {note}", file=sys.stderr))
    except KeyboardInterrupt:
        if partial_path(config.output).exists():
            print("the sums of finished texts are kept: the same command goes on from there", file=sys.stderr)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    print(f"ablation_output: {done.output}")
    top = done.rows[0]
    print(f"top_feature: {top['feature_idx']} mean_kl={top['mean_kl']:.6f}")
    return 0
