"""Runs `mechint.cli.collect`; see `--help`."""

import sys

from mechint.cli.collect import main

if __name__ == "__main__":
    sys.exit(main())
