"""Publishes the DINOv3 SAEs that examples/dinov3.json describes, from the folder where their sweep files lie.

    HF_TOKEN=... WANDB_API_KEY=... python scripts/push_dinov3.py --dry-run

It is `mechint publish-sweep --repos examples/dinov3.json`; see `--help`.
"""

import sys
from pathlib import Path

from mechint.cli.publish_sweep import main

REPOS = Path(__file__).resolve().parent.parent / "examples" / "dinov3.json"

if __name__ == "__main__":
    given = any(word.split("=")[0] == "--repos" for word in sys.argv[1:])
    sys.exit(main([*([] if given else ["--repos", str(REPOS)]), *sys.argv[1:]]))
