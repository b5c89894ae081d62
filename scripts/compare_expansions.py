"""Runs `mechint.cli.compare`; see `--help`."""

import sys

from mechint.cli.compare import main

if __name__ == "__main__":
    sys.exit(main())
