"""Runs `mechint.cli.rank`; see `--help`."""

import sys

from mechint.cli.rank import main

if __name__ == "__main__":
    sys.exit(main())
