"""docs/extend.md: each of its examples is one file, and with that file in place everything else works."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


Run = Callable[..., str]


def copy_with(example: str, place: str, tmp_path: Path) -> Run:
    """A copy of the package with the page's example in it; what runs `python -m ARGUMENTS` there and returns stdout.

    `example`: a word of the first line of its code.
    """
    page = (ROOT / "docs" / "extend.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    (code,) = [block for block in blocks if example in block.splitlines()[0]]
    ignore = shutil.ignore_patterns("__pycache__")
    for folder in ("mechint", "tests", "docs", "scripts", "benchmarks"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignore)
    for file in ("pyproject.toml", "README.md", "train.py", "sae.py"):
        shutil.copy(ROOT / file, tmp_path)
    (tmp_path / place).write_text(code, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    return run


@pytest.mark.slow
def test_the_example_of_the_page_is_an_architecture(tmp_path: Path):
    """The common tests find it and hold."""
    run = copy_with("GroupMax", "mechint/sae/architectures/groupmax.py", tmp_path)
    # all tests that go through the architectures there are, and those of the house, which nobody has to tell of it
    asks = re.compile(r"architecture_names\(\)|(from|import).*\bARCHITECTURES\b")
    found = sorted(path for path in (tmp_path / "tests").glob("test_*.py") if asks.search(path.read_text()))
    files = [str(path.relative_to(tmp_path)) for path in found if path.name != Path(__file__).name]
    assert {"tests/test_architectures.py", "tests/test_engine.py"} < set(files)
    quiet = ("-q", "-p", "no:cacheprovider", "-m", "slow or not slow")
    out = run("pytest", *quiet, *files, "-k", "groupmax")
    assert int(re.findall(r"(\d+) passed", out)[0]) >= 20
    run("pytest", *quiet, "tests/test_layers.py", "tests/test_cli.py", "-k", "layers or reference or map")
    run("mechint", "train", "--help")
    (tmp_path / "make.py").write_text("import torch; torch.save(torch.randn(900, 16), 'acts.pt')")
    subprocess.run([sys.executable, "make.py"], cwd=tmp_path, check=True)
    flags = "--activations-path acts.pt --architecture groupmax --option groups=8 --epochs 20 --batch-size 64"
    out = run("mechint", "train", *flags.split())
    assert "architecture: groupmax" in out


@pytest.mark.slow
def test_the_example_of_the_page_is_a_format(tmp_path: Path):
    """The commands, the page of formats and the common tests find it, and it holds what it says."""
    run = copy_with("onefile", "mechint/formats/onefile.py", tmp_path)
    run("mechint.cli.formats_page", "formats.md")
    page = (tmp_path / "formats.md").read_text(encoding="utf-8")
    assert "| `onefile` | an example | yes | yes |" in page
    files = [f"tests/test_formats_{name}.py" for name in ("core", "others", "hostile", "variants")]
    # those that go through all formats: by name, or by drawing them
    drawing = "no_bit_changes or comes_back_bit_for_bit or from_format_to_format or bytes_that_changed"
    out = run("pytest", "-q", *files, "-k", f"onefile or {drawing}", "-p", "no:cacheprovider")
    assert int(re.findall(r"(\d+) passed", out)[0]) >= 9
    (tmp_path / "make.py").write_text(
        "import torch; from mechint.sae import *; sae = build_sae('standard', 16, 40)\n"
        "torch.nn.init.normal_(sae.b_dec); save_checkpoint(sae, 'x.pt')"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    subprocess.run([sys.executable, "make.py"], cwd=tmp_path, check=True, env=environment)
    assert "folded: b_dec" in run("mechint", "convert", "x.pt", "sae.onefile", "--to", "onefile")
    said = run("mechint", "identify", "sae.onefile")
    assert "format: onefile" in said and "standard SAE, d_in 16, d_sae 40" in said and "b_dec not subtracted" in said
    assert "folded: b_dec" in run("mechint", "convert", "sae.onefile", "again.pt")
