"""What files say of an SAE, what of a repository is taken, and which runs can be imported; no worker process."""

import io
import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("celery")
pytest.importorskip("sqlalchemy")

from safetensors.torch import save_file  # noqa: E402
from serving import sae_files  # noqa: E402

from mechint.formats.convert import load  # noqa: E402
from mechint.server import download, importing, ingest  # noqa: E402
from mechint.server.errors import ServiceError  # noqa: E402
from mechint.server.settings import Settings  # noqa: E402


def written(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def test_the_files_fill_in_what_is_known(tmp_path: Path):
    found = ingest.read(written(tmp_path / "a", sae_files(768, 32, model_name="gpt2-small")), "gpt2")
    assert found["sae"].d_sae == 32
    assert (found["d_model"], found["n_features"], found["architecture"]) == (768, 32, "standard")
    assert (found["layer"], found["hook_type"], found["model_name"]) == (6, "residual", "gpt2")
    assert found["format"] == "community_standard" and found["sae_metadata"]["original_format"] == "saelens"
    hint = found["sae_metadata"]["model_hint"]
    assert hint["ambiguous"] and "gpt2" in hint["candidates"] and "hint" in hint["note"]


def test_gemma_scope_converts_and_computes_the_same(tmp_path: Path):
    rng = np.random.default_rng(0)
    arrays = {"W_enc": rng.normal(size=(16, 40)), "W_dec": rng.normal(size=(40, 16)), "b_enc": rng.normal(size=40)}
    arrays |= {"b_dec": rng.normal(size=16), "threshold": rng.uniform(0.1, 1.0, size=40)}
    file = io.BytesIO()
    np.savez(file, **{name: value.astype(np.float32) for name, value in arrays.items()})
    folder = written(tmp_path / "a", {"params.npz": file.getvalue()})
    found = ingest.read(folder, None)
    assert (found["format"], found["architecture"]) == ("gemma_scope", "jumprelu")
    done = ingest.convert(found["sae"], tmp_path / "out", "gemma_scope", {"repo_id": "x/y"})
    # Gemma Scope does not subtract b_dec, mechint does: it is folded, and the certificate holds
    assert done["format"] == "mechint" and done["folded"] == ["b_dec"] and done["decode_difference"] < 1e-5
    assert load(tmp_path / "out")[1].d_sae == 40


def test_what_mechint_cannot_hold_is_kept_in_saelens_layout(tmp_path: Path):
    generator = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (8, 20), "W_dec": (20, 8), "b_enc": (20,), "b_dec": (8,)}
    folder = tmp_path / "a"
    folder.mkdir()
    save_file({k: torch.randn(*v, generator=generator) for k, v in shapes.items()}, folder / "sae_weights.safetensors")
    cfg = {"architecture": "transcoder", "d_in": 8, "d_out": 8, "d_sae": 20, "apply_b_dec_to_input": False}
    (folder / "cfg.json").write_text(json.dumps(cfg | {"metadata": {"sae_lens_version": "6.1.0"}}))
    found = ingest.read(folder, None)
    assert found["architecture"] == "transcoder"
    done = ingest.convert(found["sae"], tmp_path / "out", "saelens", {})
    assert done["format"] == "saelens" and "transcoder" in done["note"] and done["weights_equal"]


def test_dimension_mismatch_is_about_the_residual_stream_only(tmp_path: Path):
    folder = written(tmp_path / "a", sae_files(768, 16))
    with pytest.raises(ServiceError, match="Dimension mismatch") as error:
        ingest.read(folder, "gpt2-xl")
    assert error.value.code == "dimension_mismatch"
    with pytest.raises(ServiceError, match="Dimension mismatch"):
        ingest.early_check(folder / "cfg.json", "gpt2-xl")
    ingest.read(folder, "somebody/unknown")
    inner = written(tmp_path / "b", sae_files(3072, 16, hook_name="blocks.6.mlp.hook_post"))
    ingest.read(inner, "gpt2")
    ingest.early_check(inner / "cfg.json", "gpt2")


class Evil:
    def __reduce__(self) -> Any:
        return (open, ("executed", "w"))


@pytest.mark.parametrize(
    ("files", "code"),
    [
        ({"notes.json": b"{}"}, "config_not_found"),
        ({"sae_weights.safetensors": sae_files(8, 8)["sae_weights.safetensors"]}, "config_not_found"),
        (sae_files(8, 8) | {"sae_weights.safetensors": b"\0" * 100}, "not_an_sae"),
        (sae_files(8, 8) | {"cfg.json": b"[" * 100_000}, None),
        ({"ae.pt": pickle.dumps(Evil()), "config.json": b"{}"}, None),
        ({"sae.pt": b'{"schema": 5}\n' + pickle.dumps(Evil())}, None),
    ],
)
def test_broken_and_hostile_files_are_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, bytes], code: str | None
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ServiceError) as error:
        ingest.read(written(tmp_path / "a", files), None)
    assert code is None or error.value.code == code
    assert error.value.status == 422 and str(tmp_path) not in str(error.value)
    assert not (tmp_path / "executed").exists()


def test_what_strangers_write_becomes_plain_json():
    odd = {"a\0b": float("nan"), "t": (1, 2.5, None, True), "long": "x" * 9999, "o": object, "u": "\ud800"}
    plain = ingest.plain(odd)
    text = json.dumps(plain, allow_nan=False)
    assert "\\u0000" not in text and len(text) < 5000 and plain["t"] == [1, 2.5, None, True]
    text.encode()
    deep: Any = 1
    for _ in range(5000):
        deep = {"a": deep}
    assert len(json.dumps(ingest.plain(deep))) < 5000


# --- what of a repository is taken ------------------------------------------------------------------------------------


class Api:
    """A repository's listing, as the Hub's client returns it."""

    def __init__(self, files: dict[str, int]):
        self.files = files

    def get_paths_info(self, repo_id: str, paths: list[str], revision: str) -> list[Any]:
        path = paths[0]
        if path in self.files:
            return [self._file(path)]
        return [SimpleNamespace(path=path)] if any(name.startswith(f"{path}/") for name in self.files) else []

    def list_repo_tree(self, repo_id: str, folder: str | None, revision: str, recursive: bool) -> list[Any]:
        prefix = f"{folder}/" if folder else ""
        names = [name for name in self.files if name.startswith(prefix)]
        return [self._file(name) for name in names if recursive or "/" not in name[len(prefix) :]]

    def _file(self, path: str) -> Any:
        return SimpleNamespace(path=path, size=self.files[path], lfs=None, blob_id="0")


def taken(files: list[str], filepath: str) -> list[str]:
    api = Api(dict.fromkeys(files, 10))
    return [file.path for file in download.files_of(api, "u/r", filepath, "c")[0]]


def test_one_sae_of_a_repository_settings_first():
    layers = [
        f"l_{i}/{name}" for i in (1, 10) for name in ("sae_weights.safetensors", "cfg.json", "README.md", "x.png")
    ]
    assert taken(layers, "l_1") == ["l_1/cfg.json", "l_1/sae_weights.safetensors"]
    assert taken(layers, "l_1/cfg.json") == taken(layers, "l_1/sae_weights.safetensors") == taken(layers, "l_1")
    assert taken(["a/b/c/params.npz"], "a") == ["a/b/c/params.npz"]
    assert taken(["cfg.json", "sae.safetensors", "model.safetensors"], ".") == ["cfg.json", "sae.safetensors"]
    assert taken(["v/0.pt", "v/1.pt", "v/config.json"], "v/1.pt") == ["v/config.json", "v/1.pt"]
    mech = ["s/sae_weights.safetensors", "s/sae_weights.safetensors.json"]
    assert sorted(taken(mech, "s")) == mech


@pytest.mark.parametrize(
    ("files", "filepath", "code"),
    [
        (["a/params.npz"], "b", "path_not_found"),
        (["a/README.md"], "a", "config_not_found"),
        (["a/sae_weights.safetensors"], "a", "config_not_found"),
        (["a/x/params.npz", "a/y/params.npz"], "a", "several_saes"),
        (["../a/params.npz", "/a/params.npz", "a/../params.npz"], ".", "config_not_found"),
        (["model.safetensors", "config.json"], ".", "config_not_found"),
    ],
)
def test_paths_without_one_sae_are_errors_before_anything_is_fetched(files: list[str], filepath: str, code: str):
    with pytest.raises(ServiceError) as error:
        taken(files, filepath)
    assert error.value.code == code


# --- runs and sweeps --------------------------------------------------------------------------------------------------


def run_at(folder: Path, hook: str, *, done: bool = True) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"hook_name": hook}))
    (folder / "state").mkdir()
    (folder / "state" / "state.pt").write_bytes(b"12345")
    if done:
        (folder / "manifest.json").write_text("{}")


def test_runs_sweeps_and_their_members(tmp_path: Path):
    settings = Settings(data_dir=tmp_path / "data", runs_root=tmp_path / "runs")
    run_at(tmp_path / "runs" / "one", "blocks.3.hook_resid_post")
    run_at(tmp_path / "runs" / "sweep" / "b", "blocks.10.hook_mlp_out")
    run_at(tmp_path / "runs" / "sweep" / "a", "blocks.2.attn.hook_z")
    run_at(tmp_path / "runs" / "sweep" / "c", "blocks.2.hook_resid_pre", done=False)
    members = [{"name": name} for name in ("b", "a", "c", "../one", "gone")]
    (tmp_path / "runs" / "sweep" / "sweep.json").write_text(json.dumps({"members": members}))
    one = importing.trained(settings, "one")
    assert [(sae.path, sae.layer, sae.hook_type) for sae in one] == [("one", 3, "residual")]
    assert one[0].size_bytes == sum(
        (tmp_path / "runs" / "one" / f).stat().st_size for f in ("config.json", "manifest.json")
    )
    found = importing.trained(settings, "sweep")
    assert [(sae.path, sae.layer, sae.hook_type) for sae in found] == [
        ("sweep/a", 2, "attention"), ("sweep/b", 10, "mlp")
    ]  # fmt: skip
    assert [sae.path for sae in importing.trained(settings, "sweep/b")] == ["sweep/b"]
    assert importing.trained(settings, "sweep/c") == []
    (tmp_path / "outside").mkdir()
    run_at(tmp_path / "outside" / "run", "blocks.0.hook_resid_pre")
    (tmp_path / "runs" / "link").symlink_to(tmp_path / "outside" / "run")
    for wrong in (
        "none",
        "../outside/run",
        "/etc",
        "..",
        ".",
        "",
        "sweep/../one",
        "one/x/y",
        "link",
        "a\0b",
        "x" * 300,
    ):
        with pytest.raises(ServiceError, match="Training not found") as error:
            importing.trained(settings, wrong)
        assert error.value.status == 404
