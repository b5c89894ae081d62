"""`mechint serve` as a command: its help, and what it says instead of starting."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAIN = "from mechint.cli.serve import main; sys.exit(main(sys.argv[1:]))"


def run(*flags: str, before: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("MECHINT_")}
    env |= {"PYTHONPATH": str(ROOT), **variables}
    command = [sys.executable, "-c", f"import sys; {before}{MAIN}", *flags]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)


def refused(done: subprocess.CompletedProcess[str]) -> str:
    """The one line that was said."""
    assert done.returncode == 2 and done.stdout == "" and done.stderr.startswith("error: "), done
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def test_help_teaches_and_imports_no_server():
    code = (
        "import atexit; atexit.register(lambda: print(sorted({'fastapi', 'sqlalchemy', 'torch'} & set(sys.modules)))); "
    )
    done = run("--help", before=code)
    assert done.returncode == 0 and done.stdout.endswith("[]\n")
    for word in ("--data-dir", "--import-root", "--workers", "MECHINT_API_KEY", "MECHINT_DATABASE_URL", "celery"):
        assert word in done.stdout


@pytest.mark.parametrize("missing", ["uvicorn", "fastapi", "celery", "sqlalchemy", "alembic"])
def test_without_the_extra_it_says_how_to_get_it(tmp_path: Path, missing: str):
    said = refused(run("--data-dir", str(tmp_path / "d"), before=f"sys.modules[{missing!r}] = None; "))
    assert said == f"error: {missing} missing: pip install 'mechint[server]'\n"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--port", "70000"], "--port must be from 0 to 65535"),
        (["--workers", "-1"], "--workers must be from 0 to 64"),
        (["--prot", "1"], "--port"),
        (["--host", "256.0.0.1", "--port", "0"], "--host 256.0.0.1 is no address"),
        (["--host", "0.0.0.0", "--port", "0"], "MECHINT_API_KEY"),
    ],
)
def test_flags_that_cannot_be(tmp_path: Path, flags: list[str], words: str):
    pytest.importorskip("celery")
    pytest.importorskip("fastapi")
    assert words in refused(run("--data-dir", str(tmp_path / "data"), *flags))
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("MECHINT_DATABASE_URL", "mysql://u:secret@h/d", "not supported"),
        ("MECHINT_DATABASE_URL", "postgresql://u:secret@127.0.0.1:9/d", "cannot be used"),
        ("MECHINT_SECRET_KEY", "short", "32 bytes"),
        ("MECHINT_LEASE_SECONDS", "soon", "should be a number"),
    ],
)
def test_variables_that_cannot_be(tmp_path: Path, name: str, value: str, words: str):
    pytest.importorskip("celery")
    pytest.importorskip("fastapi")
    said = refused(run("--data-dir", str(tmp_path / "data"), "--port", "0", **{name: value}))
    assert words in said and "secret@" not in said


def test_a_port_that_is_taken(tmp_path: Path):
    pytest.importorskip("celery")
    pytest.importorskip("fastapi")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = refused(run("--port", str(port), "--data-dir", str(tmp_path / "data")))
    assert f"port {port} of 127.0.0.1 cannot be used" in said and not (tmp_path / "data").exists()
