"""Runs `mechint.cli.report`; see `--help`."""

import sys

from mechint.cli.report import main

if __name__ == "__main__":
    sys.exit(main())
