"""`python -m mechint COMMAND ...`, the same as `mechint COMMAND ...`."""

import sys

from mechint.cli import main

sys.exit(main())
