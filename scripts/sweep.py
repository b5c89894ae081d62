"""Runs `mechint.cli.sweep`; see `--help`."""

import sys

from mechint.cli.sweep import main

if __name__ == "__main__":
    sys.exit(main())
