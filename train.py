"""Old entry point, kept: `scripts/train_sae.py` that writes saved_models/ and training_metrics/ as the first version did."""

import sys

from mechint.cli.train import main

if __name__ == "__main__":
    sys.exit(main(["--legacy-layout", *sys.argv[1:]]))
