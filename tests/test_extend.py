"""docs/extend.md: its example is one file, and with that file in place everything else works."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_the_example_of_the_page_is_an_architecture(tmp_path: Path):
    """A copy of the package with the page's file added: the common tests find it and hold."""
    page = (ROOT / "docs" / "extend.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    ignore = shutil.ignore_patterns("__pycache__")
    for folder in ("mechint", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "mechint" / "sae" / "architectures" / "groupmax.py").write_text(code, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    chosen = ["tests/test_architectures.py", "tests/test_engine.py", "-k", "groupmax", "-p", "no:cacheprovider"]
    out = run("pytest", "-q", *chosen)
    assert int(re.findall(r"(\d+) passed", out)[0]) >= 12
    run("mechint", "train", "--help")
    (tmp_path / "make.py").write_text("import torch; torch.save(torch.randn(900, 16), 'acts.pt')")
    subprocess.run([sys.executable, "make.py"], cwd=tmp_path, check=True)
    flags = "--activations-path acts.pt --architecture groupmax --option groups=8 --epochs 20 --batch-size 64"
    out = run("mechint", "train", *flags.split())
    assert "architecture: groupmax" in out
