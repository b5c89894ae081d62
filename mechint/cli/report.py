"""`mechint report`: one HTML file about a run, or about several side by side."""

import sys
from collections.abc import Sequence

from mechint.cli.flags import command, parse
from mechint.config import ReportConfig


@command
def main(argv: Sequence[str]) -> int:
    config = parse(ReportConfig, argv, prog="mechint report")
    from mechint.report.html import make_report, print_made

    print_made(make_report(config, progress=sys.stderr.isatty()))
    return 0
