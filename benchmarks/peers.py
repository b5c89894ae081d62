"""An environment in which the peers and this repository run in one process, for benchmarks that compare them.

    python benchmarks/peers.py             make build/peers-venv (2 GB) or find it up to date; print its python
    python benchmarks/peers.py SCRIPT ...  run a script with it

SAELens, dictionary_learning and sparsify come from the package registry at exact versions, beside the torch and
transformers that constraints.txt pins for this repository, which is installed as it lies (editable).
dictionary_learning is installed without its dependencies: it wants an old nnsight, which the others' versions rule out,
for its activation buffer alone.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "peers-venv"
TORCH = "torch==2.13.0"  # first and by its exact version, as in the Makefile
PEERS = ("sae-lens==6.54.12", "eai-sparsify==1.3.3", "transformer-lens==3.9.0")
# sae-dashboard: only the classes that its files are read with.
WITHOUT_DEPENDENCIES = ("dictionary-learning==0.1.0", "sae-dashboard==0.8.0")
# What the peers need beyond constraints.txt.
PINS = """\
babe==0.0.7
cloudpickle==3.1.2
config2py==0.1.76
dol==0.3.100
formulaic==1.2.2
graze==0.1.46
i2==0.1.91
importlib-resources==7.1.0
interface-meta==2.0.1
joblib==1.6.0
narwhals==2.29.0
natsort==8.4.0
nltk==3.10.4
patsy==1.0.3
plotly==7.1.0
plotly-express==0.4.1
py2store==0.1.24
python-dotenv==1.2.4
schedulefree==1.4.1
scipy==1.17.1
simple-parsing==0.1.9
statsmodels==0.15.0
tenacity==9.2.1
wrapt==2.5.2
"""


def constraints(pinned: str) -> str:
    """The lines of constraints.txt, then the peers' own; a package that constraints.txt pins keeps its pin."""

    def name(line: str) -> str:
        return line.partition("==")[0].strip().lower().replace("_", "-")

    known = {name(line) for line in pinned.splitlines()}
    extra = [line for line in PINS.splitlines() if name(line) not in known]
    return "\n".join([pinned.rstrip("\n"), "# Peers", *extra]) + "\n"


def fingerprint(root: Path = ROOT) -> str:
    """What decides the environment's contents; a finished environment carries it, so that a change makes it anew."""
    parts = [TORCH, *PEERS, *WITHOUT_DEPENDENCIES, PINS, sys.version.split()[0]]
    parts += [(root / name).read_text() for name in ("constraints.txt", "pyproject.toml")]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def ensure(folder: Path = FOLDER) -> Path:
    """The python of the peers' environment, made or brought up to date if it is not; says so on stderr."""
    python, stamp, wanted = folder / "bin" / "python", folder / ".ready", fingerprint()
    if stamp.is_file() and stamp.read_text() == wanted:
        return python
    print(f"making {folder} from the package registry (about 2 GB, some minutes) ...", file=sys.stderr, flush=True)
    if not python.is_file():
        venv.create(folder, with_pip=True)
    stamp.unlink(missing_ok=True)
    limits = folder / "constraints.txt"
    limits.write_text(constraints((ROOT / "constraints.txt").read_text()))
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    for words in (
        [TORCH, "-c", str(limits)],
        [*PEERS, "-e", str(ROOT), "-c", str(limits)],
        ["--no-deps", *WITHOUT_DEPENDENCIES],
    ):
        # stdout belongs to the benchmark's own result.
        if subprocess.run([*pip, *words], stdout=sys.stderr).returncode:
            sys.exit(f"could not install {' '.join(words)}: is the package registry reachable?")
    stamp.write_text(wanted)
    return python


def run_inside() -> None:
    """Go on in the peers' environment: returns there, and re-executes the running script otherwise."""
    # As the commands run: a thread that waits for work must not take a core from a neighbour. Read when torch loads.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if Path(sys.prefix).resolve() == FOLDER.resolve():
        return
    python = ensure()
    os.execv(python, [str(python), *sys.argv])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Make the environment that holds the peers; run a script in it.")
    parser.add_argument("script", nargs=argparse.REMAINDER, help="a script and its arguments, run with it")
    args = parser.parse_args(argv)
    python = ensure()
    if not args.script:
        print(python)
        return 0
    return subprocess.run([str(python), *args.script]).returncode


if __name__ == "__main__":
    sys.exit(main())
