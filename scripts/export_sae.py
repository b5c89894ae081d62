"""Runs `mechint.cli.export`; see `--help`."""

import sys

from mechint.cli.export import main

if __name__ == "__main__":
    sys.exit(main())
