"""Files of other tools that are broken, hostile or claim what they do not hold: an error in one line, nothing executed,
no memory taken.
"""

import json
import os
import pickle
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from other_formats import OTHERS, any_file, example_of, linear_state, main_file, make, read, write
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
            assert all(torch.isfinite(tensor).all() for tensor in found.weights().values())


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
    held = example_of(name)
    changes: list[tuple[dict[str, Any], str]] = [({"input_scale": 2.0}, "input scale")]
    if held.architecture == "topk":
        changes.append(({"rescale_acts_by_decoder_norm": True}, "decoder norms"))
    for change, says in changes:
        assert says in str(FORMATS[name].holds(held.variant(**change)))
        with pytest.raises(MechintError, match=says):
            write(name, held.variant(**change), tmp_path)
    if name not in ("sparsify", "gemma_scope_2"):
        assert FORMATS[name].holds(held.variant(transcoder=True)) == "a transcoder"
    assert not list(tmp_path.iterdir())


def test_gemma_scope_transcoders_are_known_by_their_folder(tmp_path: Path):
    folder = tmp_path / "models--google--gemma-scope-2b-pt-transcoders" / "layer_1"
    folder.mkdir(parents=True)
    path = write("gemma_scope", make("jumprelu", apply_b_dec_to_input=False), folder)
    loaded = read("gemma_scope", path)
    assert loaded.is_transcoder and "transcoder" in loaded.notes[0]
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


@pytest.mark.parametrize("name", ["sparsify", "dictionary_learning", "mech_platform", "gemma_scope_2"])
def test_a_name_that_stands_twice_in_the_settings_is_refused(name: str, tmp_path: Path):
    """One reader takes the first, another the last: two SAEs in one file."""
    path = any_file(name, tmp_path)
    (settings_file,) = path.glob("*.json")
    content = settings_file.read_text()
    repeated = next(iter(json.loads(content)))
    settings_file.write_text(f'{{"{repeated}": 1, ' + content.lstrip()[1:])
    with pytest.raises(MechintError, match=f"'{repeated}' stands there twice"):
        read(name, path)
    settings_file.write_text("{" + '"nested": {"k": 1, "k": 2}, ' + content.lstrip()[1:])
    with pytest.raises(MechintError, match="'k' stands there twice"):
        read(name, path)


def test_a_name_that_stands_twice_in_saelens_files_and_in_first_lines(tmp_path: Path):
    assert FORMATS["saelens"].write
    FORMATS["saelens"].write(make("topk"), tmp_path / "lens")
    cfg = tmp_path / "lens" / "cfg.json"
    cfg.write_text('{"k": 1, ' + cfg.read_text().lstrip()[1:])
    with pytest.raises(MechintError, match="'k' stands there twice"):
        read("saelens", tmp_path / "lens")
    path = any_file("saev", tmp_path)
    path.write_bytes(b'{"schema":1,' + path.read_bytes()[1:])
    assert not FORMATS["saev"].sniff(path)
    with pytest.raises(MechintError, match="'schema' stands there twice"):
        read("saev", path)


def test_an_array_that_stands_twice_in_an_npz(tmp_path: Path):
    path = any_file("gemma_scope", tmp_path)
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("b_enc.npy", archive.read("b_enc.npy"))
    with pytest.raises(MechintError, match="b_enc twice"):
        read("gemma_scope", path)


HUGE = "9" * 5000  # more digits than Python parses
NUMBERS = ("-2", "0", "1e400", "NaN", "-Infinity", "1e30", "2.5", "true", "[3]", '"3"', "null", "8", HUGE)


@pytest.mark.parametrize("value", NUMBERS)
@pytest.mark.parametrize(
    "name", ["sparsify", "mech_platform", "saelens", "saelens_pre6", "dictionary_learning", "saev"]
)
def test_a_k_that_is_none(name: str, value: str, tmp_path: Path):
    loaded = make("topk", relu=name not in ("mech_platform", "saev"))
    held = next(found for found, _ in variants(loaded) if FORMATS[name].holds(found) is None)
    path = write(name, held, tmp_path)
    k = f": {held.saved_options()['k']}"
    if name == "saev":
        line, rest = path.read_bytes().split(b"\n", 1)
        path.write_bytes(line.replace(f'"top_k":{k[2:]}'.encode(), f'"top_k":{value}'.encode()) + b"\n" + rest)
        assert value.encode() in path.read_bytes()
    else:
        (settings_file,) = path.glob("*.json")
        content = settings_file.read_text()
        settings_file.write_text(content.replace(f'"k"{k}', f'"k": {value}'))
        assert value in settings_file.read_text() and content != settings_file.read_text()
    if name == "dictionary_learning":  # it has it in the weights too
        state = torch.load(path / "ae.pt", weights_only=True)
        torch.save({key: tensor for key, tensor in state.items() if key != "k"}, path / "ae.pt")
    with pytest.raises(MechintError) as error:
        read(name, path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


@pytest.mark.parametrize(
    "value", ["-5", "0", "1e400", "NaN", "true", "[5]", '"5"', "6", HUGE, str(2**63), str(2**64 + 5)]
)
@pytest.mark.parametrize("width", ["d_in", "d_sae"])
@pytest.mark.parametrize("name", ["sparsify", "mech_platform", "saelens", "saelens_pre6", "saev"])
def test_a_width_that_is_none(name: str, width: str, value: str, tmp_path: Path):
    """What the settings say of the widths and what the weights have must be the same number."""
    theirs = {
        "sparsify": {"d_sae": "num_latents"},
        "mech_platform": {"d_in": "input_dim", "d_sae": "n_features"},
        "saev": {"d_in": "d_model"},
    }
    key, true = theirs.get(name, {}).get(width, width), {"d_in": 5, "d_sae": 7}[width]
    loaded = make("topk", relu=name not in ("mech_platform", "saev"))
    held = next(found for found, _ in variants(loaded) if FORMATS[name].holds(found) is None)
    path = write(name, held, tmp_path)
    (file,) = [path] if path.is_file() else path.glob("*.json")
    content = file.read_bytes()
    changed = re.sub(f'"{key}": ?{true}\\b'.encode(), f'"{key}":{value}'.encode(), content, count=1)
    assert changed != content
    file.write_bytes(changed)
    if (name, width, value) == ("sparsify", "d_sae", "0"):
        return  # there 0 stands for expansion_factor * d_in, tested elsewhere
    with pytest.raises(MechintError):
        read(name, path)


@pytest.mark.parametrize(
    "entry",
    [
        {"shape": [2**32, 2**32], "data_offsets": [0, 0]},
        {"shape": [2**62], "data_offsets": [0, 4]},
        {"shape": [-5, 7], "data_offsets": [0, 140]},
        {"shape": [5.0, 7], "data_offsets": [0, 140]},
        {"shape": [5, 7], "data_offsets": [0, 139]},
        {"shape": [5, 7], "data_offsets": [140, 0]},
        {"shape": [5, 7], "data_offsets": [0, 2**64 - 1]},
        {"shape": [5, 7], "data_offsets": [0, 140], "dtype": "F33"},
        {"shape": [0, 7], "data_offsets": [0, 0]},
        {"shape": [], "data_offsets": [0, 4]},
    ],
)
@pytest.mark.parametrize("name", ["mistudio", "sparsify", "mech_platform", "gemma_scope_2", "saelens"])
def test_a_safetensors_header_that_lies(name: str, entry: dict[str, Any], tmp_path: Path):
    if name == "saelens":
        assert FORMATS[name].write
        FORMATS[name].write(make("standard"), path := tmp_path / "lens")
    else:
        path = any_file(name, tmp_path)
    file = next(path.glob("*.safetensors"))
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    weight = next(key for key in header if key.lower().endswith(("encoder.weight", "w_enc")))
    header[weight] = {**header[weight], **entry}
    lie = json.dumps(header).encode()
    file.write_bytes(len(lie).to_bytes(8, "little") + lie + content[8 + length :])
    for form in FORMATS.values():
        form.sniff(path)
    with pytest.raises(MechintError):
        read(name, path)
    # a header that would be larger than the file, or than memory
    for claimed in (2**63, 2**64 - 1, len(content) + 1, 2**32):
        file.write_bytes(claimed.to_bytes(8, "little") + content[8:])
        assert not FORMATS[name].sniff(path) or name == "saelens"  # told by its cfg.json
        with pytest.raises(MechintError, match="not a safetensors file"):
            read(name, path)


ODD_FILES = """
import os, resource
resource.setrlimit(resource.RLIMIT_AS, (1 << 34, 1 << 34))
from pathlib import Path
from other_formats import OTHERS, any_file, make
from mechint.errors import MechintError
from mechint.formats import FORMATS
from mechint.formats.convert import identify, load
for name in (*OTHERS, "saelens", "mechint"):
    folder = Path({folder!r}) / name
    folder.mkdir()
    path = folder / "out"
    if name in OTHERS:
        path = any_file(name, folder)
    else:
        FORMATS[name].write(make("standard"), path)
    for file in [file for file in (path, *path.rglob("*")) if file.is_file()]:
        aside = file.with_name("aside")
        os.rename(file, aside)
        for how in ("zero", "pipe", "loop", "dangling", "folder"):
            if how == "pipe":
                os.mkfifo(file)
            elif how == "folder":
                file.mkdir()
            else:
                os.symlink({{"zero": "/dev/zero", "loop": file, "dangling": "/nowhere"}}[how], file)
            for chosen in (None, name):
                try:
                    found = load(path, from_format=chosen)[1]
                    print("opened", name, file.name, how, found.d_sae)
                except MechintError as error:
                    assert "\\n" not in str(error)
            if path.exists():
                identify(path)
            file.rmdir() if how == "folder" else file.unlink()
        os.rename(aside, file)
    linked = folder / "linked"
    os.symlink(path, linked)  # as the Hub's cache holds its files
    assert load(linked, from_format=name)[1].d_sae == 7
print("done")
"""


@pytest.mark.slow
def test_devices_pipes_and_links_in_place_of_files(tmp_path: Path):
    """In a process of its own: where one of them is read, it ends by running out of time or memory."""
    places = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-c", ODD_FILES.format(folder=str(tmp_path))],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, places))},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0 and done.stdout.endswith("done\n"), done.stdout[-2000:] + done.stderr[-2000:]
    # settings that may be missing leave an SAE that still says which it is
    opened = [line.split()[1:3] for line in done.stdout.splitlines() if line.startswith("opened")]
    assert {tuple(found) for found in opened} <= {
        ("mistudio", "metadata.json"),
        ("dictionary_learning", "config.json"),
        ("gemma_scope_2", "config.json"),
        ("mechint", "cfg.json"),
        ("mechint", "sae_weights.safetensors"),
        ("mechint", "checkpoint.pt"),
    }, opened


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
