"""Publishes a run directory: `python scripts/push_run.py runs/NAME --repo USER/NAME`; see `--help`."""

import sys

from mechint.cli.publish_sae import push_run

if __name__ == "__main__":
    sys.exit(push_run())
