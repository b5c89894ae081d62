"""Train the built-in model again: python scripts/train_builtin.py --help"""

import sys

from mechint.builtin.recipe import main

if __name__ == "__main__":
    sys.exit(main())
