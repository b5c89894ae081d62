"""Runs `mechint.cli.train`; see `--help`."""

import sys

from mechint.cli.train import main

if __name__ == "__main__":
    sys.exit(main())
