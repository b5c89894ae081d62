"""Every mistake that users make: status 2, one line that says what to do, and nothing written.

The commands run in this process, because starting Python for each would take minutes; a few run as their script.
"""

import contextlib
import dataclasses
import hashlib
import importlib
import json
import pickle
import re
import resource
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import HOOK
from loopback_hub import client_env, closed_endpoint
from safetensors.torch import load_file, save_file

from mechint.cli import COMMANDS
from mechint.config import CollectConfig, SAETrainConfig
from mechint.data import collect_activations
from mechint.sae import StandardSAE, save_checkpoint
from mechint.train import train

ROOT = Path(__file__).resolve().parent.parent
D_IN = 32


class RunsCode:
    """Unpickling this makes the file `marker`."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[Callable, tuple]:
        return open, (str(self.marker), "w")


@pytest.fixture(scope="module")
def place(tiny_neox_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with good files, among them a finished run, and a folder `bad/` of broken ones.

    No test may change anything here: each compares the tree before and after.
    """
    folder = tmp_path_factory.mktemp("place")
    words = [
        "the",
        "cat",
        "sat",
        "on",
        "the",
        "mat",
        "and",
        "the",
        "dog",
        "ran",
        "far",
        "away",
        "from",
        "home",
        "again",
    ]
    lines = [" ".join(words[(i + 3 * j) % 15] for j in range(4 + i % 9)) for i in range(24)]
    (folder / "texts.txt").write_text("\n".join(lines) + "\n")
    (folder / "model").symlink_to(tiny_neox_dir)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        collect = CollectConfig(
            model="model", dataset="texts.txt", output=Path("store"), checkpoint_every=8, device="cpu"
        )
        collect_activations(collect, progress=False)
        settings = SAETrainConfig(
            activations_path="store", activation_dim=D_IN, expansion=2, epochs=3, batch_size=16, warmup_steps=1,
            lambda_warmup_steps=1, run_name="a", val_fraction=0.2, device="cpu",
        )  # fmt: skip
        train(settings, progress=False)
        one = dataclasses.replace(collect, num_texts=1, output=Path("one_text"))
        collect_activations(one, progress=False)
        torch.manual_seed(0)
        torch.save(torch.randn(200, D_IN), "acts.pt")
        make_bad_files(folder / "bad", folder)
    return folder


def make_bad_files(bad: Path, good: Path) -> None:
    bad.mkdir()
    for name in ("acts.pt", "runs/a/checkpoint.pt"):
        data = (good / name).read_bytes()
        (bad / f"cut_{Path(name).name}").write_bytes(data[: len(data) * 2 // 3])
    (bad / "empty.pt").write_bytes(b"")
    (bad / "noise.pt").write_bytes(bytes(range(256)) * 40)
    for name, value in (("nan", float("nan")), ("inf", float("inf"))):
        rows = torch.load(good / "acts.pt", weights_only=True)
        rows[17, 3] = value
        torch.save(rows, bad / f"{name}.pt")
    torch.save(torch.zeros(10, D_IN, dtype=torch.int64), bad / "integers.pt")
    torch.save(torch.zeros(10), bad / "flat.pt")
    torch.save({"a": torch.zeros(3)}, bad / "dict.pt")
    torch.save(RunsCode(bad / "marker"), bad / "code.pt")
    (bad / "code_plain.pt").write_bytes(pickle.dumps({"W_dec": RunsCode(bad / "marker")}))
    weights = torch.load(good / "runs/a/checkpoint.pt", weights_only=True)
    torch.save({**weights, "b_enc": torch.zeros(5)}, bad / "shapes.pt")
    torch.save({**weights, "b_enc": weights["b_enc"] + float("nan")}, bad / "nan_weights.pt")
    save_checkpoint(StandardSAE(2 * D_IN, 4 * D_IN), bad / "wide_sae.pt")
    shutil.copytree(good / "store", bad / "cut_store")
    shard = bad / "cut_store" / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    shutil.copytree(good / "store", bad / "nan_store")
    shard = bad / "nan_store" / "shard-00001.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(shard).items()}
    tensors["activations"][4, 0] = float("nan")
    save_file(tensors, shard)
    shutil.copytree(good / "store", bad / "lost_store")
    (bad / "lost_store" / "shard-00002.safetensors").unlink()
    shutil.copytree(good / "runs" / "a", bad / "unfinished", ignore=shutil.ignore_patterns("manifest.json", "*.pt"))
    (bad / "unfinished" / "state").mkdir()
    torch.save(RunsCode(bad / "marker"), bad / "unfinished" / "state" / "state.pt")
    (bad / "blank.txt").write_text("\n  \n")
    (bad / "latin1.txt").write_bytes("caf\xe9\n".encode("latin-1"))
    (bad / "lines.jsonl").write_text('{"body": "a text"}\n')
    (bad / "unknown_key.json").write_text('{"learnig_rate": 1.0}')
    (bad / "not_json.json").write_text('{"epochs": ')
    (bad / "null.json").write_text('{"epochs": null}')
    (bad / "huge.json").write_text('{"epochs": 1e999, "seed": NaN}')
    (bad / "empty_model").mkdir()
    (bad / "broken_model").mkdir()
    (bad / "broken_model" / "config.json").write_text('{"model_type": "no_such_architecture"}')
    (bad / "cut_model").mkdir()
    for file in (good / "model").iterdir():
        shutil.copy(file, bad / "cut_model")
    weights_file = bad / "cut_model" / "model.safetensors"
    weights_file.write_bytes(weights_file.read_bytes()[: -weights_file.stat().st_size // 2])


def snapshot(folder: Path) -> dict[str, str]:
    """Every file with its hash, and every folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in folder.rglob("*")
    }


def run_command(command: str, words: list[str]) -> int:
    return importlib.import_module(COMMANDS[command][0]).main(words)


def check_refused(
    place: Path, capsys: pytest.CaptureFixture[str], command: str, flags: str | list[str], message: str
) -> None:
    """Run the command; it must end with status 2 and one line matching `message`, and leave the tree as it was."""
    before = snapshot(place)
    capsys.readouterr()
    with warnings.catch_warnings(record=True) as caught:  # in a process of its own they would be lines on stderr
        warnings.simplefilter("always")
        status = run_command(command, flags if isinstance(flags, list) else flags.split())
    out, err = capsys.readouterr()
    assert not caught, [str(warning.message) for warning in caught]
    assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1, err
    assert status == 2
    assert re.search(message, err), err
    assert out == ""
    assert snapshot(place) == before


@pytest.fixture(autouse=True)
def inside(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)


# --- train -----------------------------------------------------------------------------------------------------------

TRAIN = "--activations-path acts.pt --epochs 5 --batch-size 8"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--activations-path none.pt", r"not found: none\.pt; make them with python scripts/collect_activations\.py"),
        ("--activations-path none", "not found: none"),
        ("--activations-path bad/cut_acts.pt", "bad/cut_acts.pt is not an activation file: truncated"),
        ("--activations-path bad/empty.pt", "bad/empty.pt is not an activation file: truncated"),
        ("--activations-path bad/noise.pt", "bad/noise.pt is not an activation file"),
        ("--activations-path bad/cut_store", "shard-00001.safetensors is damaged"),
        ("--activations-path bad/lost_store", "shard-00002.safetensors is missing"),
        ("--activations-path bad", "bad holds one store for each hook: give one of bad/cut_store, bad/lost_store"),
        ("--activations-path model", "model is not an activation store: it has no store.json"),
        ("--activations-path bad/integers.pt", "expected floating-point activations"),
        ("--activations-path bad/flat.pt", r"expected floating-point activations \[N, d_in\]"),
        ("--activations-path bad/dict.pt", "holds a dict, not one tensor"),
        ("--activations-path bad/code.pt", "code in it is not run"),
        ("--activations-path bad/code_plain.pt", "bad/code_plain.pt is not an activation file"),
        ("--activations-path bad/nan.pt", "bad/nan.pt: row 17 holds NaN or Inf; collect again"),
        ("--activations-path bad/inf.pt", "bad/inf.pt: row 17 holds NaN or Inf; collect again"),
        ("--activations-path bad/nan_store", r"bad/nan_store: row \d+ holds NaN or Inf"),
        (f"{TRAIN} --activation-dim 512", "width 32, but --activation-dim is 512: pass --activation-dim 32"),
        (f"{TRAIN} --val-fraction 1", "--val-fraction is the share held out, 0 <= share < 1, got 1"),
        (f"{TRAIN} --val-fraction -0.1", "--val-fraction is the share held out"),
        (f"{TRAIN} --run-name a/b", "run name 'a/b' must be one folder name .*--runs-root"),
        (f"{TRAIN} --run-name ..", r"run name '\.\.' must be one folder name"),
        (f"{TRAIN} --run-name ../b", r"run name '\.\./b' must be one folder name"),
        ([*TRAIN.split(), "--run-name", ""], "run name '' must be one folder name"),
        (f"{TRAIN} --config bad/unknown_key.json", "unknown key 'learnig_rate'; nearest: learning_rate"),
        (f"{TRAIN} --config bad/not_json.json", "config file bad/not_json.json cannot be read"),
        (f"{TRAIN} --config bad/null.json", "null.json: epochs should be of type int, found None"),
        (f"{TRAIN} --config bad/huge.json", "huge.json: .* should be of type int"),
        (f"{TRAIN} --config none.json", "config file not found: none.json"),
        (f"{TRAIN} --config bad", "config file bad cannot be read"),
        (f"{TRAIN} --config", "--config: expected one argument"),
        (f"{TRAIN} --lamb 3", r"unknown flag --lamb; nearest: --lam.*--help"),
        (f"{TRAIN} stray", "'stray' belongs to no flag"),
        (f"{TRAIN} --epochs many", "epochs: invalid literal for int.*'many'.*--help"),
        (f"{TRAIN} --split-by line", "invalid choice 'line'"),
        (f"{TRAIN} --epochs 0", "--epochs must be at least 1, got 0"),
        (f"{TRAIN} --expansion 0", "--expansion must be at least 1, got 0"),
        (f"{TRAIN} --seed -1", "--seed must be at least 0"),
        (f"{TRAIN} --learning-rate inf", "--learning-rate must be a finite number"),
        (f"{TRAIN} --lam nan", "--l1-lambda must not be negative, got nan"),
        (f"{TRAIN} --device cuda:7", "device 'cuda:7' cannot be used here .* try --device cpu"),
        (f"{TRAIN} --device warp", "device 'warp' cannot be used here"),
        (f"{TRAIN} --runs-root acts.pt", "acts.pt cannot be made .*give another place"),
        (f"{TRAIN} --runs-root acts.pt/runs", "acts.pt/runs cannot be made .*give another place"),
        (f"{TRAIN} --runs-root /proc/none", "/proc/none cannot be made .*give another place"),
        (f"{TRAIN} --run-name {'a' * 300}", "aaa cannot be made .*give another place"),
        ("--activations-path store --hook-name blocks.1.hook_resid_post", "collected with hook_name 'blocks.3.hook_"),
        ("--activations-path store --model-name pythia-160m", "collected with model_name 'model'"),
        ("--activations-path one_text --epochs 2", "a validation share of 0.05 leaves nothing to train on"),
        ("--resume none", "run directory not found: none"),
        ("--resume bad", "bad has no config.json: not a run directory"),
        ("--resume runs/a", "runs/a is finished: there is nothing to resume"),
        ("--resume bad/unfinished", "state.pt cannot be read"),
        (f"{TRAIN} --batch-size 100000", r"--batch-size 100000 is more than the \d+ rows there are to train on"),
        (f"{TRAIN} --architecture topk --k 4000", "--k must be a whole number from 1 to d_sae"),
        (f"{TRAIN} --k 4", "--k does not apply to architecture 'standard', only to batchtopk, matryoshka"),
        (f"{TRAIN} --architecture top", "unknown --architecture 'top'; nearest: topk"),
        (f"{TRAIN} --expansion -2", "--expansion must be at least 1, got -2"),
        (f"{TRAIN} --architecture jumprelu --penalty quadratic", "--penalty quadratic and --target-l0 belong together"),
        (f"{TRAIN} --architecture topk --target-l0 9", "topk has none: --k 9 is its L0"),
        (f"{TRAIN} --target-l0 900", "--target-l0 900 is more than the"),
        (f"{TRAIN} --target-l0 0", "--target-l0 must be above 0"),
        (f"{TRAIN} --target-l0 9 --lam 0", "--target-l0 steers the weight that --lam starts at"),
        (f"{TRAIN} --warmup-steps 1.5", "takes a whole number from 0, or a share from 0% to 100%, got 1.5"),
        (f"{TRAIN} --warmup-steps 0.05", "got 0.05: write 5%"),
        (f"{TRAIN} --dead-after 101%", "--dead-after takes a whole number"),
        (f"{TRAIN} --lambda-warmup-steps soon", "got soon"),
        (f"{TRAIN} --kernel fast", "unknown --kernel 'fast'"),
        (f"{TRAIN} --option depth=3", "--depth does not apply to architecture 'standard'"),
        ("--resume runs/a --epochs 9", r"runs/a is being trained with epochs \d+, not 9: --resume takes its settings"),
    ],
)  # fmt: skip
def test_train(place: Path, capsys: pytest.CaptureFixture[str], flags: str | list[str], message: str):
    check_refused(place, capsys, "train", flags, message)


# --- collect ---------------------------------------------------------------------------------------------------------

COLLECT = "--model model --dataset texts.txt --num-texts 5 --device cpu --output out.pt"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--num-texts 0", "--num-texts must be at least 1, got 0"),
        ("--num-texts -3", "--num-texts must be at least 1"),
        ("--dataset bad/blank.txt", "bad/blank.txt has no text: it is empty or all blank; .*builtin/tales"),
        ("--dataset bad/latin1.txt", "line 1: not UTF-8 .*iconv"),
        ("--dataset bad/lines.jsonl", "line 1 has no field 'text', only body: use --text-field"),
        ("--dataset none.txt", "no such file or folder: none.txt; .*builtin/tales"),
        ("--dataset builtin/tails", "unknown built-in data set 'builtin/tails'; nearest: builtin/tales"),
        ("--dataset no/such", "data set no/such .*Hub cannot be reached.*builtin/tales"),
        ("--dataset acts.pt", "acts.pt: texts are read from .txt, .jsonl, .parquet"),
        ("--split valid", "local files have no splits"),
        ("--revision v1", "only data sets on the Hub have revisions"),
        ("--model pythia-70n", "unknown model 'pythia-70n': .*nearest: pythia-70m"),
        ("--model EleutherAI/pythia-70m", "not in the local cache and the Hub cannot be reached.*builtin/pythia-tiny"),
        ("--model ./none", r"unknown model '\./none'"),
        ("--model builtin/pythia-small", "unknown built-in model .*builtin/pythia-tiny"),
        ("--model bad/empty_model", "folder without config.json"),
        ("--model bad/broken_model", "model bad/broken_model cannot be loaded"),
        ("--model bad/cut_model", "model bad/cut_model cannot be loaded"),
        ("--hook blocks.9.hook_resid_post", "model has 6 layers, so the last block is blocks.5"),
        ("--hook blocks.3.hook_resid_pots", "nearest: blocks.3.hook_resid_post"),
        ("--hook blocks.3.hook_resid_pots --backend transformers", "nearest: blocks.3.hook_resid_post"),
        ("--hook nonsense", "has no hook 'nonsense'"),
        (f"--layer 5 --hook {HOOK}", f"--layer 5 contradicts --hook {HOOK}, which is in layer 3: give only --hook"),
        ("--layer 5 --hook hook_embed", "--layer 5 contradicts --hook hook_embed, which is in no layer"),
        ("--output acts.pt", "acts.pt exists and is not overwritten"),
        ("--output texts.txt", "texts.txt exists and is not a folder"),
        ("--output bad", "bad holds other files .* and no store: give another --output"),
        ("--output store", "store was collected with other settings"),
        ("--output texts.txt/out.pt", "cannot be written: .*/texts.txt is a file, not a folder"),
        ("--output texts.txt/out", "cannot be written: .*/texts.txt is a file, not a folder"),
        ("--output /proc/none/out.pt", "/proc/none/out.pt.shards cannot be made .*give another place"),
        ("--device cuda:7", "device 'cuda:7' cannot be used here .* try --device cpu"),
        ("--context-size 1", "--context-size must be at least 2"),
        ("--dtype float8", "invalid choice 'float8'"),
        ("--processing none", "invalid choice 'none'"),
        ("--batch-size 0", "--batch-size must be at least 1"),
        ("--max-chars -1", "--max-chars must not be negative"),
    ],
)
def test_collect(place: Path, capsys: pytest.CaptureFixture[str], flags: str, message: str):
    check_refused(place, capsys, "collect", f"{COLLECT} {flags}", message)


# --- eval, ablate, compare, verify -----------------------------------------------------------------------------------

NOT_AN_SAE = [
    ("none.pt", "(checkpoint not found:|no SAE at) none.pt"),
    ("bad/dict.pt", "bad/dict.pt is not an SAE: expected W_enc, b_enc, W_dec and b_pre .* found a"),
    ("acts.pt", "acts.pt holds a Tensor, not the state dict of an SAE"),
    ("bad/noise.pt", r"bad/noise.pt is (truncated|not a plain tensor file)"),
    ("bad/empty.pt", "bad/empty.pt is truncated or not a state dict: EOFError"),
    ("bad/cut_checkpoint.pt", "bad/cut_checkpoint.pt is truncated or not a state dict"),
    ("bad/code.pt", "bad/code.pt is not a plain tensor file and was not executed"),
    ("bad/code_plain.pt", "bad/code_plain.pt is not a plain tensor file and was not executed"),
    ("bad/shapes.pt", r"bad/shapes.pt: b_enc has shape \[5\], expected \[64\]"),
    ("bad/nan_weights.pt", "bad/nan_weights.pt: b_enc holds values that are not finite"),
    ("bad", "bad holds 4 SAEs; give one of them: nan_weights.pt"),
    ("store", "store holds activations, not an SAE: --activations-path takes it"),
]


@pytest.mark.parametrize(("checkpoint", "message"), NOT_AN_SAE)
@pytest.mark.parametrize("command", ["eval", "ablate", "compare"])
def test_checkpoint_that_is_not_an_sae(
    place: Path, capsys: pytest.CaptureFixture[str], command: str, checkpoint: str, message: str
):
    flags = {
        "eval": f"--checkpoint {checkpoint} --activations-path store --output out.json",
        "ablate": f"--checkpoint {checkpoint} --eval-texts-path texts.txt --model model --output out.csv",
        "compare": f"--checkpoints runs/a/checkpoint.pt {checkpoint} --output out.csv",
    }
    check_refused(place, capsys, command, flags[command], message)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "Provide --checkpoint or --run-dir"),
        ("--run-dir none", "run directory not found: none"),
        ("--run-dir bad", "bad has no config.json"),
        ("--run-dir bad/unfinished", "has no checkpoint.pt: its training is not finished; go on with"),
        ("--run-dir runs/a --activations-path none.pt", "activations not found: none.pt"),
        ("--run-dir runs/a --activations-path bad/cut_store", "shard-00001.safetensors is damaged"),
        ("--run-dir runs/a --activations-path bad/nan_store", "NaN or Inf"),
        ("--run-dir runs/a --activations-path bad/nan.pt --rows all", "row 17 of bad/nan.pt holds NaN or Inf"),
        ("--checkpoint bad/wide_sae.pt --activations-path store", "width 32, but bad/wide_sae.pt has d_in 64"),
        (
            "--run-dir runs/a --eval-texts-path none.txt",
            "text file not found: none.txt; it should hold one text a line",
        ),
        ("--run-dir runs/a --eval-texts-path bad/blank.txt", "bad/blank.txt is empty; it should hold one text a line"),
        ("--run-dir runs/a --eval-texts-path bad/latin1.txt", "line 1: not UTF-8"),
        ("--run-dir runs/a --model pythia-70n", "unknown model 'pythia-70n'"),
        ("--run-dir runs/a --model EleutherAI/pythia-70m", "the Hub cannot be reached"),
        ("--run-dir runs/a --output texts.txt", "texts.txt exists: give another --output, or --overwrite"),
        ("--run-dir runs/a --output bad --overwrite", "bad is a folder"),
        ("--run-dir runs/a --output texts.txt/eval.json", "texts.txt is a file, not a folder; give another place"),
        ("--checkpoint runs/a/checkpoint.pt --config bad/unknown_key.json", "unknown key 'learnig_rate'"),
        ("--checkpoint runs/a/checkpoint.pt --config none.json", "config file not found: none.json"),
        ("--run-dir runs/a --batch-size 0", "--batch-size must be at least 1"),
        ("--rundir runs/a", "unknown flag --rundir; nearest: --run-dir"),
    ],
)
def test_eval(place: Path, capsys: pytest.CaptureFixture[str], flags: str, message: str):
    output = "" if "--output" in flags else " --output out.json"
    check_refused(place, capsys, "eval", flags + output, message)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--eval-texts-path none.txt", "text file not found: none.txt; it should hold one text a line"),
        ("--eval-texts-path bad/blank.txt", "bad/blank.txt is empty; it should hold one text a line"),
        ("--feature-subset 3,64", "latent 64 is out of range, the SAE has latents 0 to 63"),
        ("--feature-subset 0-99", "latent 64 is out of range, the SAE has latents 0 to 63"),
        ("--feature-subset one", "'one' is not a latent's index; write 1,2,3 or 0-99,512"),
        ("--feature-subset=-1", "'-1' is not a latent's index"),
        (["--feature-subset", ""], "the feature subset is empty: name latents"),
        (["--feature-subset", ","], "is not a latent's index"),
        ("--hook blocks.1.hook_resid_post", f"says {HOOK}; --hook says blocks.1.hook_resid_post: which hook is it"),
        ("--processing centred", "trained on raw activations.*processing"),
        ("--model builtin/pythia-tiny", "d_in 32, but blocks.3.hook_resid_post of builtin/pythia-tiny is 128 wide"),
        ("--model no/such", "the Hub cannot be reached"),
        ("--checkpoint bad/wide_sae.pt", "the SAE has d_in 64, but blocks.3.hook_resid_post of model is 32 wide"),
        ("--output texts.txt", "texts.txt exists: give another --output, or --overwrite"),
        ("--output bad --overwrite", "bad is a folder: give the name of a file in it"),
        ("--output texts.txt/out.csv", "texts.txt is a file, not a folder; give another place"),
        ("--config bad/unknown_key.json", "unknown key 'learnig_rate'"),
        ("--batch-size 0", "--batch-size must be at least 1"),
        ("--context-size 1", "--context-size must be at least 2"),
        ("--features 1", "unknown flag --features; nearest: --feature-subset"),
    ],
)
def test_ablate(place: Path, capsys: pytest.CaptureFixture[str], flags: str | list[str], message: str):
    words = "--checkpoint runs/a/checkpoint.pt --eval-texts-path texts.txt --output out.csv --model model --device cpu"
    more = flags if isinstance(flags, list) else flags.split()
    check_refused(place, capsys, "ablate", [*words.split(), *more], message)


def test_ablate_without_flags(place: Path, capsys: pytest.CaptureFixture[str]):
    message = r"missing: --eval-texts-path PATH, --output PATH; `batch_ablate.py --help`"
    check_refused(place, capsys, "ablate", "", message)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--checkpoints runs/a/checkpoint.pt", "--checkpoints needs two or more files to compare, got 1"),
        ("--checkpoints", "--checkpoints needs two or more files to compare, got 0"),
        ("--checkpoints runs/a bad/wide_sae.pt", "runs/a has d_in 32, bad/wide_sae.pt has d_in 64"),
        ("--checkpoints runs/a runs/a --activation-dim 512", "runs/a has d_in 32, but --activation-dim 512 was given"),
        ("--checkpoints runs/a runs/a --output texts.txt", "texts.txt exists: give another --output, or --overwrite"),
        ("--checkpoints runs/a runs/a --output bad --overwrite", "bad is a folder"),
        (
            "--checkpoints runs/a runs/a --output texts.txt/c.csv",
            "texts.txt is a file, not a folder; give another place",
        ),
        ("--checkpoints runs/a runs/a --block-size 0", "--block-size must be at least 1"),
    ],
)
def test_compare(place: Path, capsys: pytest.CaptureFixture[str], flags: str, message: str):
    output = "" if "--output" in flags else " --output out.csv"
    check_refused(place, capsys, "compare", flags + output, message)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("none", "run directory not found: none"),
        ("bad", "bad has no config.json"),
        ("bad/unfinished", "has no manifest.json: its training is not finished; go on with"),
        ("", "missing: PATH; `mechint verify --help`"),
    ],
)
def test_verify(place: Path, capsys: pytest.CaptureFixture[str], flags: str, message: str):
    check_refused(place, capsys, "verify", flags, message)


# --- code in a pickle ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["code.pt", "code_plain.pt", "unfinished/state/state.pt"])
def test_code_in_a_pickle_would_run_but_never_does(place: Path, name: str, tmp_path: Path):
    """The files above do carry code: loaded the careless way, they make the marker that no command made."""
    marker = place / "bad" / "marker"
    assert not marker.exists()
    try:
        with contextlib.suppress(RuntimeError):  # raised when the code has run already
            torch.load(place / "bad" / name, weights_only=False)
        assert marker.exists()
    finally:
        marker.unlink(missing_ok=True)


# --- full disk -------------------------------------------------------------------------------------------------------


@contextmanager
def room_for_files_of(n_bytes: int) -> Iterator[None]:
    """A limit on the size of files stands for a full disk: the write that exceeds it fails in its middle."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def last_line(err: str) -> str:
    lines = err.strip().splitlines()
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:] and "Traceback" not in err, err
    return lines[-1]


def test_disk_full_in_the_middle_of_a_shard(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = f"--model model --dataset {tmp_path}/texts.txt --device cpu --checkpoint-every 4 --output {tmp_path}/out.pt"
    (tmp_path / "texts.txt").write_text(
        "\n".join(["the cat"] * 8 + ["the dog ran far away from home again " * 3] * 4) + "\n"
    )
    with room_for_files_of(6_000):
        assert run_command("collect", words.split()) == 2
    error = last_line(capsys.readouterr().err)
    assert "no room to write" in error and "shard-00002" in error and "run the same command again" in error
    kept = snapshot(tmp_path / "out.pt.shards")
    assert {f"shard-0000{i}.safetensors" for i in range(2)} == {name for name in kept if "shard-" in name}
    assert not (tmp_path / "out.pt").exists()
    assert run_command("train", ["--activations-path", f"{tmp_path}/out.pt"]) == 2
    assert "is not finished; go on with: python scripts/collect" in last_line(capsys.readouterr().err)
    assert run_command("collect", words.split()) == 0
    assert (
        len(torch.load(tmp_path / "out.pt", weights_only=True))
        == json.loads((tmp_path / "out.json").read_text())["num_vectors"]
    )


@pytest.mark.parametrize(
    ("n_bytes", "name"),
    [(3_000, "state.pt"), (56_000, "checkpoint.pt")],
)
def test_disk_full_while_training(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], n_bytes: int, name: str
):
    words = f"{TRAIN} --expansion 2 --runs-root {tmp_path} --run-name a --save-every 2 --device cpu"
    with room_for_files_of(n_bytes):
        assert run_command("train", words.split()) == 2
    assert "no room to write" in last_line(capsys.readouterr().err)
    assert not (tmp_path / "a" / "manifest.json").exists()


def test_disk_full_while_writing_results(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    commands = {
        "eval": f"--run-dir runs/a --output {tmp_path}/out --device cpu --overwrite",
        "ablate": f"--checkpoint runs/a --eval-texts-path texts.txt --model model --output {tmp_path}/out --overwrite",
        "compare": f"--checkpoints runs/a runs/a --output {tmp_path}/out --overwrite",
    }
    for command, flags in commands.items():
        (tmp_path / "out").write_text("what was there before")
        with room_for_files_of(200):
            assert run_command(command, flags.split()) == 2, command
        assert "no room to write" in last_line(capsys.readouterr().err)
        assert snapshot(tmp_path) == {"out": hashlib.sha256(b"what was there before").hexdigest()}, command


# --- as processes ----------------------------------------------------------------------------------------------------


def run_script(
    script: str, flags: str, cwd: Path, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, str(ROOT / script), *flags.split()]
    return subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [
        ("scripts/train_sae.py", "--val-fraction 1", "--val-fraction is the share held out"),
        ("train.py", "--run-name a/b", "must be one folder name"),
        ("scripts/collect_activations.py", "--num-texts 0", "--num-texts must be at least 1"),
        ("scripts/batch_ablate.py", "--output x", "missing: --eval-texts-path PATH"),
        ("mechint/__main__.py", "trian", "unknown command 'trian'; nearest: train"),
    ],
)
def test_scripts_end_with_status_2_and_one_line(tmp_path: Path, script: str, flags: str, message: str):
    done = run_script(script, flags, tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(f"error: .*{message}.*\n", done.stderr), done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("offline", [False, True])
@pytest.mark.parametrize("what", ["model", "dataset"])
def test_hub_out_of_reach_is_said_within_seconds(tmp_path: Path, what: str, offline: bool):
    """Nothing listens at the endpoint. The library's own retries would take half a minute."""
    env = client_env(closed_endpoint(), tmp_path / "hf", offline=offline)
    (tmp_path / "texts.txt").write_text("a text\n")
    (tmp_path / "cwd").mkdir()
    flags = {"model": f"--model pythia-70m --dataset {tmp_path}/texts.txt", "dataset": "--model builtin/pythia-tiny"}
    started = time.monotonic()
    done = run_script("scripts/collect_activations.py", flags[what], tmp_path / "cwd", env)
    seconds = time.monotonic() - started
    assert done.returncode == 2
    said = {
        "model": "--model builtin/pythia-tiny which needs no network",
        "dataset": "--dataset builtin/tales which needs",
    }
    assert re.fullmatch(f"error: .*Hub cannot be reached: check the network .*{said[what]}.*\n", done.stderr), (
        done.stderr
    )
    assert not list((tmp_path / "cwd").iterdir())
    assert seconds < 25, "mostly imports, on a busy machine; the library's retries alone take longer"
