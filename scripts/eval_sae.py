"""Runs `mechint.cli.evaluate`; see `--help`."""

import sys

from mechint.cli.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
