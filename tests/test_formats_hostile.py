"""Files of other tools that are broken, hostile or claim what they do not hold: an error in one line, nothing executed,
no memory taken.
"""

import os
import pickle
import tempfile
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from other_formats import OTHERS, any_file, as_held_by, linear_state, main_file, make, read, write
from safetensors.torch import load_file, save_file

from mechint.errors import MechintError
from mechint.formats import FORMATS
from mechint.formats.folds import variants


@pytest.mark.parametrize("name", OTHERS)
def test_a_file_that_was_cut_off_is_an_error(name: str, tmp_path: Path):
    path = any_file(name, tmp_path)
    file = main_file(path)
    whole = file.read_bytes()
    for end in (0, 1, 7, 30, len(whole) // 3, len(whole) // 2, len(whole) - 40, len(whole) - 1):
        file.write_bytes(whole[:end])
        FORMATS[name].sniff(path)
        with pytest.raises(MechintError):
            read(name, path)
    file.unlink()
    with pytest.raises(MechintError):
        read(name, path)
    assert not FORMATS[name].sniff(path)


@given(st.sampled_from(OTHERS), st.data())
@settings(max_examples=150, deadline=None)
def test_bytes_that_changed_are_an_error_or_an_sae(name: str, data: st.DataObject):
    with tempfile.TemporaryDirectory() as folder:
        path = any_file(name, Path(folder))
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        file = data.draw(st.sampled_from(files))
        content = bytearray(file.read_bytes())
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        file.write_bytes(content)
        for form in FORMATS.values():
            form.sniff(path)
        try:
            found = read(name, path)
        except MechintError as error:
            assert "\n" not in str(error)
        else:
            assert all(torch.isfinite(tensor).all() for tensor in found.tensors.values())


class Evil:
    """Makes a file when unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("name", ["saev", "dictionary_learning", "openai"])
def test_code_in_a_pickle_is_not_run(name: str, tmp_path: Path):
    path = any_file(name, tmp_path)
    file, marker = main_file(path), tmp_path / "ran"
    header = file.read_bytes().split(b"\n")[0] + b"\n" if name == "saev" else b""
    with open(file, "wb") as out:
        out.write(header)
        torch.save({"W_enc": torch.zeros(2, 2), "evil": Evil(marker)}, out)
    for form in FORMATS.values():
        form.sniff(path)
    with pytest.raises(MechintError, match="not executed"):
        read(name, path)
    assert not marker.exists()


def test_code_in_an_npz_is_not_run(tmp_path: Path):
    marker = tmp_path / "ran"
    np.savez(tmp_path / "params.npz", W_enc=np.array([Evil(marker)], dtype=object), W_dec=np.zeros((2, 2)), b_enc=[0.0])
    with pytest.raises(MechintError, match="floating-point"):
        read("gemma_scope", tmp_path / "params.npz")
    assert not marker.exists()


def test_a_tensor_that_claims_more_than_is_stored(tmp_path: Path):
    """Four bytes that would become four terabytes as soon as they are copied."""
    state = {"bias": torch.zeros(1_000_000), "encoder.bias": torch.zeros(3)}
    state["encoder.weight"] = torch.zeros(1).expand(1_000_000, 1_000_000)
    state["decoder.weight"] = state["encoder.weight"]
    torch.save(state, tmp_path / "ae.pt")
    assert (tmp_path / "ae.pt").stat().st_size < 10_000_000
    with pytest.raises(MechintError, match="claims 4000000000000 bytes"):
        read("dictionary_learning", tmp_path / "ae.pt")


def test_archives_that_unpack_to_a_multiple_of_themselves(tmp_path: Path):
    np.savez_compressed(tmp_path / "params.npz", W_enc=np.zeros((2000, 2000)), W_dec=np.zeros((2000, 2000)))
    with pytest.raises(MechintError, match="would unpack"):
        read("gemma_scope", tmp_path / "params.npz")
    torch.save(linear_state(0, 500, 2000), tmp_path / "stored.pt")
    with (
        zipfile.ZipFile(tmp_path / "stored.pt") as stored,
        zipfile.ZipFile(tmp_path / "ae.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for info in stored.infolist():
            packed.writestr(info.filename, bytes(info.file_size) if "/data/" in info.filename else stored.read(info))
    with pytest.raises(MechintError, match="would unpack"):
        read("dictionary_learning", tmp_path / "ae.pt")


@pytest.mark.parametrize("claimed", ["(9, 7)", "(1000000, 1000000)", "(-5, -7)", "(3, 7)"])
def test_an_npz_whose_header_claims_another_shape(claimed: str, tmp_path: Path):
    path = any_file("gemma_scope", tmp_path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    header = members["W_enc.npy"]
    true = b"'shape': (5, 7), }"
    assert true in header
    lie = f"'shape': {claimed}, }}".encode()
    spare = b" " * (len(lie) - len(true))  # the header is padded with blanks, which make room
    members["W_enc.npy"] = header.replace(true + spare, lie.ljust(len(true)), 1)
    assert len(members["W_enc.npy"]) == len(header) and claimed.encode() in members["W_enc.npy"]
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    with pytest.raises(MechintError, match="do not fill|not an .npz"):
        read("gemma_scope", path)


@pytest.mark.parametrize("name", OTHERS)
def test_settings_without_a_place_are_refused(name: str, tmp_path: Path):
    architecture = "topk" if name in ("sparsify", "mech_platform") else "standard"
    loaded = as_held_by(name, make(architecture))
    held = next(found for found, _ in variants(loaded) if FORMATS[name].holds(found) is None)
    for change, says in (({"scale": 2.0}, "input scale"), ({"rescale_acts_by_decoder_norm": True}, "decoder norms")):
        assert says in str(FORMATS[name].holds(replace(held, **change)))
        with pytest.raises(MechintError, match=says):
            write(name, replace(held, **change), tmp_path)
    if name not in ("sparsify", "gemma_scope_2"):
        assert FORMATS[name].holds(replace(held, transcoder=True)) == "a transcoder"
    assert not list(tmp_path.iterdir())


def test_gemma_scope_transcoders_are_known_by_their_folder(tmp_path: Path):
    folder = tmp_path / "models--google--gemma-scope-2b-pt-transcoders" / "layer_1"
    folder.mkdir(parents=True)
    path = write("gemma_scope", make("jumprelu", apply_b_dec_to_input=False), folder)
    loaded = read("gemma_scope", path)
    assert loaded.transcoder and "transcoder" in loaded.notes[0]
    assert loaded.metadata["layer"] == 1


def test_settings_that_are_nested_without_end_or_huge(tmp_path: Path):
    path = any_file("sparsify", tmp_path)
    (path / "cfg.json").write_text("[" * 200_000)
    with pytest.raises(MechintError, match="nested"):
        read("sparsify", path)
    (path / "cfg.json").write_text('{"k": 1' + " " * 17 * 2**20 + "}")
    with pytest.raises(MechintError, match="MiB"):
        read("sparsify", path)
    (tmp_path / "sae.pt").write_bytes(b"{" + b'"a":[' * 100_000 + b"\n" + b"PK\x03\x04")
    assert not FORMATS["saev"].sniff(tmp_path / "sae.pt")
    with pytest.raises(MechintError, match="not JSON"):
        read("saev", tmp_path / "sae.pt")


@pytest.mark.parametrize("name", ["mistudio", "sparsify", "mech_platform"])
@pytest.mark.parametrize("how", ["missing", "transposed", "extra", "nan", "integers", "scalar"])
def test_tensors_that_do_not_fit(name: str, how: str, tmp_path: Path):
    path = any_file(name, tmp_path)
    file = main_file(path)
    tensors = load_file(file)
    weight = next(key for key in tensors if key.endswith("encoder.weight"))
    if how == "missing":
        del tensors[weight]
    elif how == "transposed":
        tensors[weight] = tensors[weight].T.contiguous()
    elif how == "extra":
        tensors["W_surprise"] = torch.zeros(2)
    elif how == "nan":
        tensors[weight][1, 1] = float("nan")
    elif how == "integers":
        tensors[weight] = tensors[weight].long()
    else:
        tensors[weight] = torch.tensor(1.0)
    save_file(tensors, file)
    with pytest.raises(MechintError):
        read(name, path)


def test_other_things_under_these_names(tmp_path: Path):
    for content in (pickle.dumps({"a": 1}), b"", b"{}\n", b"\x80\x04", os.urandom(300)):
        for name in OTHERS:
            file = tmp_path / (FORMATS[name].file_name or "checkpoint.safetensors")
            file.write_bytes(content)
            assert not FORMATS[name].sniff(file)
            with pytest.raises(MechintError):
                read(name, file)
    torch.save([torch.zeros(2)], tmp_path / "ae.pt")
    with pytest.raises(MechintError, match="list"):
        read("dictionary_learning", tmp_path / "ae.pt")
    torch.save({3: torch.zeros(2)}, tmp_path / "ae.pt")
    with pytest.raises(MechintError, match="int as a name"):
        read("dictionary_learning", tmp_path / "ae.pt")
    torch.save({"bias": torch.eye(3).to_sparse()}, tmp_path / "ae.pt")
    with pytest.raises(MechintError, match="dense|not a plain"):
        read("dictionary_learning", tmp_path / "ae.pt")
