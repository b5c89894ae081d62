"""Runs `mechint.cli.ablate`; see `--help`."""

import sys

from mechint.cli.ablate import main

if __name__ == "__main__":
    sys.exit(main())
