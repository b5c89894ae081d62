"""The activation store: the contract of docs/store.md, both file forms, old files, damaged files."""

import hashlib
import json
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import load_file, save_file

from mechint.data import open_activations
from mechint.data.pt_file import assemble_pt, data_offset, make_empty_pt
from mechint.data.store import shards_folder, sidecar_path, tokens_path
from mechint.data.store_write import begin_store, finished_shards, texts_sha256, write_shard
from mechint.errors import MechintError

D_IN = 8


def store_by_the_document(folder: Path, sizes=(5, 1, 7), d_in: int = D_IN) -> np.ndarray:
    """A store as docs/store.md describes it, with numpy, safetensors and json only. Returns all rows."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    shards, rows, text = [], [], 0
    for number, n in enumerate(sizes):
        activations = rng.standard_normal((n, d_in)).astype(np.float32)
        name = f"shard-{number:05d}.safetensors"
        tensors = {
            "activations": activations,
            "tokens": rng.integers(0, 50, n).astype(np.int32),
            "text_ids": np.full(n, text, dtype=np.int32),
            "positions": np.arange(1, n + 1, dtype=np.int32),
        }
        save_numpy(tensors, folder / name)
        digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        shards.append({"name": name, "n_rows": n, "sha256": digest})
        rows.append(activations)
        text += 1
    info = {
        "format_version": 1,
        "d_in": d_in,
        "dtype": "float32",
        "shards": shards,
        "n_rows": sum(sizes),
        "n_texts": text,
        "hook_name": "blocks.3.hook_resid_post",
        "layer": 3,
        "processing": "raw",
        "prepend_bos": True,
        "keep_bos": False,
        "a_field_of_the_future": {"is": "ignored"},
    }
    (folder / "store.json").write_text(json.dumps(info))
    return np.concatenate(rows)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    store_by_the_document(tmp_path / "store")
    return tmp_path / "store"


def edit_info(folder: Path, **changes: object) -> None:
    info = json.loads((folder / "store.json").read_text())
    (folder / "store.json").write_text(json.dumps({**info, **changes}))


def test_a_store_built_by_the_document_opens(tmp_path: Path):
    rows = torch.from_numpy(store_by_the_document(tmp_path / "store"))
    activations = open_activations(tmp_path / "store")
    assert (activations.n_rows, activations.d_in, activations.nbytes) == (13, D_IN, 13 * D_IN * 4)
    assert torch.equal(activations.tensor(), rows)
    assert activations.text_ids.tolist() == [0] * 5 + [1] + [2] * 7
    assert activations.positions.tolist() == [*range(1, 6), 1, *range(1, 8)]
    assert activations.tokens.shape == (13,)
    assert activations.info["hook_name"] == "blocks.3.hook_resid_post"
    activations.check_finite()
    activations.verify()
    shards = activations.info["shards"]
    canonical = json.dumps(shards, sort_keys=True, separators=(",", ":")).encode()
    assert activations.sha256 == hashlib.sha256(canonical).hexdigest()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_rows_in_any_order_and_batches(store: Path, dtype: str):
    for file in store.glob("*.safetensors"):
        tensors = load_file(file)
        tensors["activations"] = tensors["activations"].to(getattr(torch, dtype))
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, file)
    edit_info(store, dtype=dtype)
    activations = open_activations(store)
    whole = activations.tensor()
    assert whole.dtype == torch.float32
    for picks in ([12, 0, 5, 5, 4, 6], [0, 4, 5, 6, 12], [5], [], [12] * 20):
        indices = torch.tensor(picks, dtype=torch.long)
        rows = activations.rows(indices)
        assert rows.dtype == torch.float32 and torch.equal(rows, whole[indices])
    assert [len(batch) for batch in activations.batches(4)] == [4, 4, 4, 1]
    assert torch.equal(torch.cat(list(activations.batches(4))), whole)
    indices = torch.tensor([9, 2, 12, 0, 1])
    assert torch.equal(torch.cat(list(activations.batches(2, indices))), whole[indices])
    for wrong in (-1, 13):
        with pytest.raises(IndexError):
            activations.rows(torch.tensor([wrong]))


def test_norms_are_read_or_computed(store: Path, tmp_path: Path):
    """Shards of earlier versions have none; a row whose squares overflow has the largest float32, not infinity."""
    rows = open_activations(store).tensor()
    computed = open_activations(store).norms
    torch.testing.assert_close(computed, rows.norm(dim=1))
    file = store / "shard-00002.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "norms": torch.arange(7, dtype=torch.float32)}, file)
    assert open_activations(store).norms.tolist() == [*computed[:6].tolist(), *range(7)]
    save_file({**tensors, "norms": torch.zeros(6)}, file)
    with pytest.raises(MechintError, match="6 norms of 7 rows"):
        _ = open_activations(store).norms
    bare = torch.full((2, 4), 3e38)
    bare[0] = 2
    torch.save(bare, tmp_path / "bare.pt")
    assert open_activations(tmp_path / "bare.pt").norms.tolist() == [4.0, torch.finfo(torch.float32).max]


def test_what_rows_returns_is_the_callers_own(store: Path):
    activations = open_activations(store)
    before = activations.tensor().clone()
    activations.rows(torch.tensor([0, 1])).zero_()
    next(iter(activations.batches(3))).zero_()
    assert torch.equal(open_activations(store).tensor(), before)
    assert torch.equal(activations.tensor(), before)


def test_nan_is_found_and_named(store: Path):
    file = store / "shard-00002.safetensors"
    tensors = load_file(file)
    for value in (float("nan"), float("inf"), -float("inf")):
        tensors["activations"][3, 2] = value
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, file)
        with pytest.raises(MechintError, match="row 9 holds NaN or Inf"):
            open_activations(store).check_finite()


def test_a_changed_shard_fails_verification(store: Path):
    file = store / "shard-00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    activations = open_activations(store)
    with pytest.raises(MechintError, match="shard-00001.*was changed"):
        activations.verify()


def damage(store: Path, how: str) -> None:
    shard = store / "shard-00001.safetensors"
    data = shard.read_bytes()
    match how:
        case "truncated":
            shard.write_bytes(data[:-1])
        case "longer":
            shard.write_bytes(data + b"x")
        case "empty":
            shard.write_bytes(b"")
        case "header":
            shard.write_bytes(struct.pack("<Q", 1 << 40) + data[8:])
        case "missing":
            shard.unlink()
        case "width":
            edit_info(store, d_in=D_IN + 1)
        case "dtype":
            edit_info(store, dtype="bfloat16")
        case "version":
            edit_info(store, format_version=2)
        case "no version":
            edit_info(store, format_version=None)
        case "no shards":
            edit_info(store, shards=[])
        case "field":
            info = json.loads((store / "store.json").read_text())
            del info["dtype"]
            (store / "store.json").write_text(json.dumps(info))
        case "json":
            (store / "store.json").write_text("{")
        case "no json":
            (store / "store.json").unlink()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", "shard-00001.*damaged"),
        ("longer", "shard-00001.*damaged"),
        ("empty", "shard-00001.*damaged"),
        ("header", "shard-00001.*damaged"),
        ("missing", "shard-00001.*missing"),
        ("width", r"float32 \[5, 8\].*\[5, 9\]"),
        ("dtype", "bfloat16"),
        ("version", "format version 2.*reads up to 1.*update"),
        ("no version", "format_version"),
        ("no shards", "lists no shard"),
        ("field", "dtype"),
        ("json", "cannot be read"),
        ("no json", "no store.json"),
    ],
)
def test_damaged_stores(store: Path, how: str, message: str):
    damage(store, how)
    with pytest.raises(MechintError, match=message):
        open_activations(store)


def test_columns_that_do_not_belong(store: Path):
    file = store / "shard-00001.safetensors"
    tensors = load_file(file)
    tensors["tokens"] = torch.zeros(9, dtype=torch.int32)
    save_file(tensors, file)
    with pytest.raises(MechintError, match="13 rows, but 21 tokens"):
        _ = open_activations(store).tokens


# --- .pt files ------------------------------------------------------------------------------------------------------


def test_a_bare_pt_of_the_first_version(tmp_path: Path):
    rows = torch.randn(20, D_IN)
    torch.save(rows, tmp_path / "a.pt")
    activations = open_activations(tmp_path / "a.pt")
    assert activations.info == {} and activations.tokens is None and activations.text_ids is None
    assert torch.equal(activations.tensor(), rows)
    assert activations.sha256 == hashlib.sha256((tmp_path / "a.pt").read_bytes()).hexdigest()
    assert torch.equal(activations.rows(torch.tensor([3, 1])), rows[[3, 1]])


def test_a_pt_with_the_originals_sidecar(tmp_path: Path):
    torch.save(torch.randn(20, D_IN), tmp_path / "a.pt")
    config = {
        "activation_dim": 512,
        "hook_name": "blocks.2.hook_resid_post",
        "layer": 5,
        "model_name": "pythia-70m",
        "model_source": "EleutherAI/pythia-70m",
        "dataset_name": "openwebtext",
        "num_texts": 4,
    }
    sidecar = {"activation_dim": 512, "activation_path": "a.pt", "config": config, "num_vectors": 20, "git_commit": "x"}
    (tmp_path / "a.json").write_text(json.dumps(sidecar))
    info = open_activations(tmp_path / "a.pt").info
    assert info["legacy"] and info["processing"] == "centred" and info["prepend_bos"] and info["keep_bos"]
    assert (info["hook_name"], info["layer"]) == ("blocks.2.hook_resid_post", 2)


def test_a_pt_older_than_the_zip_format(tmp_path: Path):
    rows = torch.randn(6, D_IN)
    torch.save(rows, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(open_activations(tmp_path / "a.pt").tensor(), rows)


class Trap:
    """Unpickling this would create a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_is_not_run(tmp_path: Path, zipped: bool):
    trap = Trap(tmp_path / "sprung")
    if zipped:
        torch.save(trap, tmp_path / "a.pt")
    else:
        (tmp_path / "a.pt").write_bytes(pickle.dumps(trap))
    with pytest.raises(MechintError, match="not an activation file"):
        open_activations(tmp_path / "a.pt")
    assert not (tmp_path / "sprung").exists()
    pickle.loads(pickle.dumps(trap))  # the trap works
    assert (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"W_dec": torch.zeros(2, 2)}, "holds a dict"),
        (torch.zeros(3), r"float32 \[3\]"),
        (torch.zeros(3, 4, dtype=torch.long), r"int64 \[3, 4\]"),
        (torch.zeros(0, 4), r"\[0, 4\]"),
    ],
)
def test_pt_files_of_another_kind(tmp_path: Path, value: object, message: str):
    torch.save(value, tmp_path / "a.pt")
    with pytest.raises(MechintError, match=message):
        open_activations(tmp_path / "a.pt")


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.999])
def test_truncated_pt(tmp_path: Path, keep: float):
    torch.save(torch.randn(500, D_IN), tmp_path / "a.pt")
    data = (tmp_path / "a.pt").read_bytes()
    (tmp_path / "a.pt").write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(MechintError, match="truncated or not written by torch.save"):
        open_activations(tmp_path / "a.pt")


def test_missing_file_says_how_to_make_it(tmp_path: Path):
    with pytest.raises(MechintError, match="not found.*collect_activations.py"):
        open_activations(tmp_path / "nowhere.pt")


# --- making a .pt from shards ---------------------------------------------------------------------------------------

INFO = {"format_version": 1, "d_in": D_IN, "dtype": "float32", "shards": []}
NORMS = {"position_0": {"bins": {}, "max": 0.0}, "rest": {"bins": {}, "max": 0.0}}


def shards_for(output: Path, sizes=(5, 1, 7), dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, dict]:
    folder = shards_folder(output)
    begin_store(folder, {"settings": {}, "info": {}, "command": "the command"})
    rows = torch.randn(sum(sizes), D_IN, generator=torch.Generator().manual_seed(0)).to(dtype)
    start = 0
    for number, n in enumerate(sizes):
        write_shard(
            folder,
            number,
            activations=rows[start : start + n],
            tokens=torch.arange(n, dtype=torch.int32),
            text_ids=torch.full((n,), number, dtype=torch.int32),
            positions=torch.arange(n, dtype=torch.int32),
            norms=rows[start : start + n].float().norm(dim=1),
            record={"n_texts": 1, "texts_sha256": "", "state": None, "norms": NORMS},
        )
        start += n
    return rows.float(), {**INFO, "n_rows": len(rows)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_assembled_pt_is_what_torch_save_writes(tmp_path: Path, dtype: torch.dtype):
    output = tmp_path / "a.pt"
    rows, info = shards_for(output, dtype=dtype)
    with pytest.raises(MechintError, match="not finished.*the command"):
        open_activations(output)
    assemble_pt(output, {"activation_dim": D_IN}, info)
    for mmap in (True, False):
        loaded = torch.load(output, mmap=mmap, weights_only=True)
        assert loaded.dtype == torch.float32 and torch.equal(loaded, rows)
    assert zipfile.ZipFile(output).testzip() is None  # checksums right, for readers that look
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.pt", "a.tokens.safetensors"]
    activations = open_activations(output)
    activations.verify()
    assert activations.sha256 == hashlib.sha256(output.read_bytes()).hexdigest()
    assert activations.text_ids.tolist() == [0] * 5 + [1] + [2] * 7
    assert sidecar_path(output).exists() and tokens_path(output).exists()


def test_assembly_goes_on_after_a_kill_at_any_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Stop at every write_record, unlink, replace in turn; the next call must end with the same bytes."""
    import os

    from mechint.data import pt_file

    whole = tmp_path / "whole.pt"
    rows, info = shards_for(whole)
    assemble_pt(whole, {}, info)
    expected = whole.read_bytes()

    class Killed(BaseException):
        pass

    stopped = 0
    for stop_at in range(100):
        output = tmp_path / f"{stop_at}" / "whole.pt"
        shards_for(output)
        calls = 0

        def counted(real, stop_at=stop_at):
            def call(*args, **kwargs):
                nonlocal calls
                calls += 1
                if calls > stop_at:
                    raise Killed
                return real(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            patch.setattr(pt_file, "write_record", counted(pt_file.write_record))
            patch.setattr(pt_file, "write_json", counted(pt_file.write_json))
            patch.setattr(pt_file, "make_empty_pt", counted(pt_file.make_empty_pt))
            patch.setattr(pt_file, "_set_crc", counted(pt_file._set_crc))
            patch.setattr(os, "replace", counted(os.replace))
            patch.setattr(Path, "unlink", counted(Path.unlink))
            try:
                assemble_pt(output, {}, info)
            except Killed:
                stopped += 1
                if not output.exists():
                    with pytest.raises(MechintError, match="not finished"):
                        open_activations(output)
        if not output.exists():
            begin_store(shards_folder(output), {"settings": {}, "info": {}, "command": "the command"})
            assert sum(record["n_rows"] for record in finished_shards(shards_folder(output)).values()) == len(rows)
            assemble_pt(output, {}, info)
        assert output.read_bytes() == expected
        if calls <= stop_at:
            break
    else:
        raise AssertionError("never ran through")
    assert stopped > 10


def test_a_pt_beyond_four_gigabytes_has_its_data_where_torch_looks(tmp_path: Path):
    """The zip fields for large files; the file is sparse and costs no disk."""
    n_rows, d_in = 2_200_000, 512
    make_empty_pt(tmp_path / "big.pt", n_rows, d_in)
    assert (tmp_path / "big.pt").stat().st_size > n_rows * d_in * 4 > 2**32
    with open(tmp_path / "big.pt", "r+b") as file:
        file.seek(data_offset(tmp_path / "big.pt") + 4 * ((n_rows - 1) * d_in + 7))
        file.write(np.float32(1.5).tobytes())
    big = torch.load(tmp_path / "big.pt", mmap=True, weights_only=True)
    assert big.shape == (n_rows, d_in) and big[-1].nonzero().tolist() == [[7]] and big[-1, 7] == 1.5


def test_texts_hash_is_as_documented():
    texts = ["a", "", "né"]
    data = b"".join(struct.pack("<Q", len(t.encode())) + t.encode() for t in texts)
    assert texts_sha256(texts) == hashlib.sha256(data).hexdigest()
    assert texts_sha256(["ab"]) != texts_sha256(["a", "b"])
