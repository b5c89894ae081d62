"""Runs `mechint.cli.extract`; see `--help`."""

import sys

from mechint.cli.extract import main

if __name__ == "__main__":
    sys.exit(main())
