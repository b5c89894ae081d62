"""What the tests of collection share: a text file, a command line, hashes of what is on the disk."""

import hashlib
import random
from pathlib import Path

import pytest
import torch
from conftest import HOOK

from mechint.cli.collect import main

REPO = Path(__file__).resolve().parent.parent
SCRIPT = REPO / "scripts" / "collect_activations.py"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The model is tiny; more threads only wait for one another, and worse when other tests run beside this one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", name="texts_file")
def texts_fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = ["the", "cat", "sat", "on", "mat", "and", "dog", "ran", "far", "away", "from", "home", "again"]
    rng = random.Random(0)
    lines = [" ".join(rng.choices(words, k=rng.choice([1, 2, 5, 9, 17, 30]))) for _ in range(60)]
    path = tmp_path_factory.mktemp("texts") / "texts.txt"
    path.write_text("\n".join(lines) + "\n")
    return path


def flags(model: Path, texts: Path, output: Path, *more: object) -> list[str]:
    base = ["--model", model, "--hook", HOOK, "--dataset", texts, "--output", output]
    base += ["--num-texts", 50, "--checkpoint-every", 8, "--batch-size", 4, "--device", "cpu"]
    return [str(word) for word in (*base, *more)]


def snapshot(folder: Path) -> dict[str, str]:
    """Hash of every file under a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def collect_quietly(*words: object) -> Path:
    argv = [str(word) for word in words]
    assert main(argv) == 0
    return Path(argv[argv.index("--output") + 1])


class Stop(BaseException):
    pass


def stop_after(monkeypatch: pytest.MonkeyPatch, n_shards: int, error: BaseException) -> None:
    from mechint.data import store_write

    real, made = store_write.write_shard, []

    def write_shard(*args, **kwargs):
        if len(made) == n_shards:
            raise error
        made.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(store_write, "write_shard", write_shard)
