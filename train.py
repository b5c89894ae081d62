"""Old entry point, kept: `scripts/train_sae.py`, writing saved_models/ and training_metrics/ as it did at first."""

import sys

from mechint.cli.train import main

if __name__ == "__main__":
    sys.exit(main(["--legacy-layout", *sys.argv[1:]]))
