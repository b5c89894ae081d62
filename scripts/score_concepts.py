"""Runs `mechint.cli.concepts`; see `--help`."""

import sys

from mechint.cli.concepts import main

if __name__ == "__main__":
    sys.exit(main())
