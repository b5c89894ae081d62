"""docs/commands.md, made from each command's --help, and the list of commands in README.md, so that neither drifts.

`python -m mechint.cli.reference` writes both anew in the current checkout; a test fails when one differs.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from mechint.cli import COMMANDS, help_text
from mechint.cli.flags import command
from mechint.errors import MechintError
from mechint.provenance import write_text

BEGIN = "<!-- commands: begin (written by `make readme`) -->"
END = "<!-- commands: end -->"
README, PAGE = Path("README.md"), Path("docs/commands.md")
# Help is laid out for the width of the terminal; here it must come out the same everywhere.
WIDTH = 110


def reference() -> str:
    """The page docs/commands.md: the list of commands, then the help of each, folded away."""
    parts = ["# Commands", "<!-- written by `make readme` -->", f"```\n{help_text()}\n```"]
    for name, (_, _, script) in COMMANDS.items():
        same = f" = `python scripts/{script}`" if script else ""
        title = f"<summary><code>mechint {name}</code>{same}</summary>"
        parts.append(f"<details>{title}\n\n```\n{command_help(name)}\n```\n\n</details>")
    return "\n\n".join(parts) + "\n"


def command_help(name: str) -> str:
    """What `mechint NAME --help` prints at a fixed width, without colours."""
    # Nothing of the caller's terminal may show: tyro and rich look at these.
    hidden = {"FORCE_COLOR", "COLORTERM", "CLICOLOR_FORCE", "PY_COLORS"}
    env = {key: value for key, value in os.environ.items() if key not in hidden}
    env |= {"COLUMNS": str(WIDTH), "NO_COLOR": "1", "TERM": "dumb", "PYTHONIOENCODING": "utf-8"}
    arguments = [sys.executable, "-m", "mechint", name, "--help"]
    done = subprocess.run(arguments, env=env, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL)
    return "\n".join(line.rstrip() for line in done.stdout.strip().splitlines())


def with_list(text: str) -> str:
    """`text` with the list of commands between its markers. Raises `MechintError` if there are no markers."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise MechintError(f"the file needs the markers {BEGIN!r} and {END!r}, once each")
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n\n```\n{help_text()}\n```\n\n{END}{rest.split(END)[1]}"


@command
def main(argv: Sequence[str]) -> int:
    root = Path(argv[0] if argv else ".")
    write_text(root / README, with_list((root / README).read_text(encoding="utf-8")))
    write_text(root / PAGE, reference())
    print(f"wrote {root / README} and {root / PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
