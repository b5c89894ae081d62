"""Runs `mechint.cli.steer`; see `--help`."""

import sys

from mechint.cli.steer import main

if __name__ == "__main__":
    sys.exit(main())
