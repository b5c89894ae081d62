"""`mechint collect`, `scripts/collect_activations.py`."""

import signal
import sys
from collections.abc import Sequence

from mechint.cli.flags import command, is_first_process, parse, said_once
from mechint.config import COLLECT_PRESETS, CollectConfig


@command
def main(argv: Sequence[str]) -> int:
    with said_once():
        config = parse(
            CollectConfig, argv, prog="collect_activations.py", presets=lambda name, _: COLLECT_PRESETS[name]
        )
    from mechint.data.collect import collect, collect_command, summary

    # `kill`, a batch system's time limit: end as at Ctrl-C
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        done = collect(config, on_note=lambda note: print(note, file=sys.stderr))
    except KeyboardInterrupt:
        if is_first_process():
            print(f"finished shards are kept; go on with: {collect_command(config)}", file=sys.stderr)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    if done.rank == 0:
        print(summary(done))
        for path, metadata_path, _ in done.stores.values():
            print(f"activation_path: {path}")
            print(f"metadata_path: {metadata_path}")
    return 0
