"""What is published of an SAE: a run directory of ours, or a numbered folder of the first publishing platform.

A run directory goes up in SAELens's layout, with its records and its report; a folder `artifacts/run-000051` with
exactly the files that platform had, so that whoever loads those repositories loads these.
"""

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mechint.errors import MechintError, nearest
from mechint.formats.certificate import certify
from mechint.formats.convert import load
from mechint.hub.bundle import Bundle
from mechint.hub.license import SAE_LICENSE
from mechint.hub.sae_card import artifact_card, run_card
from mechint.hub.sae_files import (
    CFG,
    ENVIRONMENT,
    FEATURES,
    SIDECAR,
    WEIGHTS,
    environment,
    feature_analysis,
    finite,
    sidecar,
    to_bytes,
)
from mechint.provenance import read_json, sha256_file
from mechint.report.facts import check_finished, run_facts
from mechint.runs import Run
from mechint.sae import SAE, load_sae

ARTIFACT_FILES = (WEIGHTS, SIDECAR, ENVIRONMENT, FEATURES)
SAELENS_FILES = (WEIGHTS, CFG, "sparsity.safetensors", "runner_cfg.json")
# Of a run directory, as they are there, where they are there.
RECORDS = (
    "config.json",
    "summary.json",
    "eval.json",
    "manifest.json",
    "metrics.csv",
    "ablation.csv",
    "ranking.csv",
    "concepts.csv",
    "report.html",
)
_ARTIFACT = re.compile(r"run-(\d{6,})")


def sae_bundle(source: str | Path, *, license: str = SAE_LICENSE) -> Bundle:
    """The bundle of a run directory of `mechint train`, of a folder `artifacts/run-NNNNNN`, or of an SAE in SAELens's
    layout.

    Raises:
        MechintError: neither; a run that is still training, lacks its summary, or is not what its manifest says;
            weights that do not load.
    """
    path = Path(source)
    if not path.is_dir():
        raise MechintError(f"run directory not found: {path}; give a folder of runs/, or --run-id with --artifact-root")
    if not (path / "config.json").is_file() and (path / WEIGHTS).is_file():
        return artifact_bundle(path, license=license)
    return run_bundle(path, license=license)


# --- numbered folders -------------------------------------------------------------------------------------------------


def artifact_dir(artifact_root: str | Path, run_id: int) -> Path:
    """`artifact_root/run-000051`. Raises `MechintError` if there is no such folder."""
    root = Path(artifact_root)
    path = root / f"run-{run_id:06d}"
    if not path.is_dir():
        there = [str(number) for number in artifact_ids(root)]
        hint = nearest(str(run_id), there) if there else f"{root} has no runs: give --artifact-root"
        raise MechintError(f"run artifact directory not found: {path}; {hint}")
    return path


def artifact_ids(artifact_root: str | Path) -> list[int]:
    """Numbers of the runs in an artifact folder that hold weights, in order."""
    found = Path(artifact_root).glob(f"run-*/{WEIGHTS}")
    return sorted(int(match[1]) for path in found if (match := _ARTIFACT.fullmatch(path.parent.name)))


def artifact_bundle(folder: str | Path, *, license: str = SAE_LICENSE) -> Bundle:
    """The bundle of a folder `run-NNNNNN`: weights, their sidecar, and what else lies there of the platform's files.
    A folder in SAELens's layout has that one's files.

    Raises:
        MechintError: no weights, weights that do not load, a record that is broken.
    """
    folder = Path(folder)
    if not (folder / WEIGHTS).is_file():
        others = sorted(path.name for path in folder.iterdir())
        raise MechintError(
            f"no SAE in {folder}: it has no {WEIGHTS}, only {', '.join(others[:6]) or 'nothing'};"
            " publish a run that has trained its SAE"
        )
    layout, sae = load(folder)
    saelens = layout.name.startswith("saelens")
    match = _ARTIFACT.fullmatch(folder.resolve().name)
    run_id = int(match[1]) if match else None
    records = {name: _optional(folder / f"{name}.json") for name in ("spec", "result", "environment", "manifest")}
    records["sae_config"] = _optional(folder / SIDECAR)
    records = {name: record for name, record in records.items() if record is not None}
    names = SAELENS_FILES if saelens else ARTIFACT_FILES
    files: dict[str, Path | bytes] = {name: folder / name for name in names if (folder / name).is_file()}
    model = artifact_model(records) or sae.metadata.get("model_name")
    name = sae_repo_name(f"run{run_id}" if run_id is not None else folder.resolve().name, model)
    return Bundle(
        kind="sae",
        name=name,
        files=files,
        license=license,
        card=lambda repo_id, staged: artifact_card(name, repo_id, staged, sae, records, run_id, model, license),
        metadata=finite({"run_id": run_id if run_id is not None else folder.resolve().name, **records}),
        check=lambda downloaded: same_sae(sae, downloaded),
        check_files=tuple(file for file in (WEIGHTS, SIDECAR, CFG) if file in files),
        roots=(folder.resolve(),),
    )


def artifact_model(records: Mapping[str, Any]) -> str | None:
    """The model's name, as the run's specification, its environment or its result has it."""
    parameters = (records.get("spec") or {}).get("parameters") or {}
    places = (parameters, records.get("spec") or {}, records.get("environment") or {}, records.get("sae_config") or {})
    for place in places:
        for key in ("model", "model_name"):
            if isinstance(place, Mapping) and isinstance(place.get(key), str) and place[key]:
                return place[key]
    return None


def _optional(path: Path) -> dict[str, Any] | None:
    """A record that may be missing. Raises `MechintError` for a broken one, as an interrupted run leaves it."""
    return read_json(path, "record of the run") if path.is_file() else None


# --- run directories --------------------------------------------------------------------------------------------------


def run_bundle(run_dir: str | Path, *, license: str = SAE_LICENSE) -> Bundle:
    """The bundle of a finished run directory.

    Raises:
        MechintError: a run that is still training or lacks its summary, or whose files are not those of its manifest.
    """
    run = check_finished(run_dir)
    check_whole(run)
    facts, manifest = run_facts(run), run.manifest
    sae = load(run.path)[1]
    weights, cfg = _saelens_files(run)
    side, features = sidecar(run, sae), feature_analysis(run)
    made: dict[str, Path | bytes] = {
        WEIGHTS: weights,
        CFG: cfg,
        SIDECAR: to_bytes(side),
        ENVIRONMENT: to_bytes(environment(run)),
    }
    if features is not None:
        made[FEATURES] = to_bytes(features)
    made |= {name: run.path / name for name in RECORDS if (run.path / name).is_file()}
    pictures = sorted(path for path in (run.path / "figures").glob("*") if path.suffix in (".png", ".csv"))
    made |= {f"figures/{path.name}": path for path in pictures if path.is_file()}
    name = sae_repo_name(run.path.resolve().name, run.config.model_name)
    return Bundle(
        kind="sae",
        name=name,
        files=made,
        license=license,
        card=lambda repo_id, staged: run_card(name, repo_id, staged, sae, facts, manifest, license),
        metadata=finite(
            {
                "run_id": run.path.resolve().name,
                "spec": run.config.to_dict(),
                "result": run.summary,
                "environment": environment(run),
                "manifest": manifest,
                "sae_config": side,
            }
        ),
        check=lambda downloaded: same_sae(sae, downloaded),
        check_files=(WEIGHTS, CFG),
        roots=(run.path.resolve(),),
    )


def check_whole(run: Run) -> None:
    """Raise `MechintError` unless a finished run has its summary and the files that its manifest was written for."""
    if not run.summary_path.is_file():
        raise MechintError(
            f"{run.path} has no summary.json, so nothing says how good its SAE is: put the file back, or train the run"
            f" again with `python scripts/train_sae.py --config {run.config_path}`; `mechint verify {run.path}` says"
            " what else is missing"
        )
    outputs = run.manifest.get("outputs")
    for name, recorded in sorted((outputs if isinstance(outputs, dict) else {}).items()):
        path = run.path / name
        if not path.is_file():
            raise MechintError(f"{run.path} lacks {name}, which its manifest lists; `mechint verify {run.path}`")
        if sha256_file(path) != recorded:
            raise MechintError(
                f"{run.path}: {name} is not the file that the run wrote (its SHA-256 differs from the manifest's);"
                f" `mechint verify {run.path}` checks all of them"
            )


def _saelens_files(run: Run) -> tuple[Path | bytes, Path | bytes]:
    """Weights and settings in SAELens's layout: the run's own, or made from its checkpoint where it has none."""
    folder = run.sae_dir
    if (folder / WEIGHTS).is_file() and (folder / CFG).is_file():
        return folder / WEIGHTS, folder / CFG
    with tempfile.TemporaryDirectory() as temporary:
        made = Path(temporary)
        load_sae(run.checkpoint_path).save_model(made)
        return (made / WEIGHTS).read_bytes(), (made / CFG).read_bytes()


# --- both -------------------------------------------------------------------------------------------------------------


def same_sae(local: SAE, folder: Path) -> None:
    """Raise `MechintError` unless the SAE in `folder`, just downloaded, encodes and decodes as the local one."""
    certificate = certify(local, load(folder)[1])
    if not certificate.holds:
        raise MechintError(
            "the SAE that was downloaded again computes something else than the local one (codes differ by"
            f" {certificate.encode_difference:.1e}, reconstructions by {certificate.decode_difference:.1e}): publish it"
            " again, and tell the Hub if that does not help"
        )


def sae_repo_name(run: str, model: str | None) -> str:
    """`sae-run51-gpt2-medium`: the run and the model, in the letters that the Hub allows."""
    return plain_name(f"sae-{run}-{model}" if model else f"sae-{run}")


def plain_name(name: str) -> str:
    """`name` as a repository of the Hub can be called: `-` for other characters, 80 of them at most."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", name)
    plain = re.sub(r"-{2,}", "-", re.sub(r"\.{2,}", ".", plain))
    return plain[:80].strip("-.")
