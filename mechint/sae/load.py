"""The one door to every SAE: a run, files of any format, a checkpoint, a registered name, a repository of the Hub."""

import warnings
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from mechint.errors import MechintError, nearest
from mechint.formats import convert, mech_platform, mechint, saelens
from mechint.formats.files import BESIDE, WEIGHTS, peek_safetensors
from mechint.formats.saelens import ASSUMED, save_folder
from mechint.huggingface.fetch import (
    Fetched,
    Repo,
    check_hashes,
    fetch,
    local_bundle,
    open_repo,
    plain_values,
    split_id,
)
from mechint.huggingface.registry import SAEDescriptor, local_place, sae_registry
from mechint.huggingface.releases import Where, find_release, gemma_scope_metadata, release_names
from mechint.provenance import detect_device
from mechint.sae.architectures.standard import StandardSAE
from mechint.sae.base import SAE
from mechint.sae.legacy import SparseAutoEncoder

__all__ = ["load", "load_path", "load_release", "load_sae", "load_sae_checkpoint", "save_folder"]

SOURCE = "pretrained_sae"
WEIGHT_SUFFIXES = (".safetensors", ".pt", ".npz")


@dataclass(frozen=True)
class Pretrained:
    """An SAE that was opened.

    Attributes:
        config: what `load_pretrained_sae` returns beside it.
        verified: SHA-256 of each file that was held to what the repository states; empty if it states none.
        place: the folder or file it was read from.
    """

    sae: SAE
    config: dict[str, Any]
    verified: dict[str, str]
    place: Path


def load(
    source: str | Path,
    *,
    config: str | Path | None = None,
    from_format: str | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    registry: str | Path | None = None,
) -> SAE:
    """Open an SAE, on the CPU and in float32.

    Args:
        source: one of
            - what lies on this machine: a run directory; a folder or file of any format (docs/formats.md), a
              checkpoint.pt with or without its config.json among them;
            - a name: of a registry (`mechint list-saes`), or of a release and its SAE, `release:sae_id`;
            - a repository of the Hub: `user/repo`, `user/repo/folder`, `user/repo:folder@revision`.
        config: the config.json that belongs to a checkpoint of the original pipeline that has none beside it.
        from_format: the format of files that look like several.
        revision: branch, tag or commit of a repository.
        cache_dir: in place of the Hub library's own cache.
        registry: a registry file that is looked into first.

    Raises:
        MechintError: nothing of that name, files that are no SAE, contradict themselves or hold several (they are
            listed), or the Hub out of reach and nothing in the cache.
    """
    if config is not None or from_format is not None or isinstance(source, Path):
        return load_path(source, config=config, from_format=from_format)
    return open_pretrained_sae(source, revision=revision, cache_dir=cache_dir, registry=registry).sae


def load_path(path: str | Path, *, config: str | Path | None = None, from_format: str | None = None) -> SAE:
    """`load` of what lies on this machine."""
    path = Path(path).expanduser()
    if not path.exists():
        beside = _beside(path)
        raise MechintError(f"no SAE at {path}" + (f"; {nearest(str(path), sorted(beside))}" if beside else ""))
    if config is not None:
        if not mechint.sniff(path):
            raise MechintError(f"--config belongs to a checkpoint.pt; {path} says itself what it is: leave it out")
        sae = mechint.read_with_config(path, Path(config))
    else:
        sae = convert.load(path, from_format=from_format)[1]
    if sae.metadata.get("legacy"):
        for note in sae.notes:
            warnings.warn(note, stacklevel=3)
    return sae


def load_sae(path: str | Path, *, config: str | Path | None = None, device: str = "cpu") -> SAE:
    """`SAE.load` as a function. What is assumed of a checkpoint without a record is said in a warning."""
    return load(path, config=config).to(device)


def load_sae_checkpoint(
    checkpoint_path: str | Path, activation_dim: int, expansion: int | None = None, device: str | torch.device = "cpu"
) -> SAE:
    """`load_sae` as the original had it: a plain checkpoint opens as the class whose call is `(x_hat, feature_acts)`.

    Raises:
        MechintError: as `load_sae`, and for weights of another width, or of another number of latents than
            `expansion * activation_dim` where an expansion is given.
    """
    sae = load_sae(checkpoint_path, device=str(device))
    if sae.d_in != activation_dim:
        raise MechintError(f"{checkpoint_path} has d_in {sae.d_in}, but activation_dim {activation_dim} was asked for")
    if expansion is not None and sae.d_sae != expansion * sae.d_in:
        raise MechintError(
            f"{checkpoint_path} has {sae.d_sae} latents for d_in {sae.d_in}, but expansion {expansion} was asked for"
        )
    return SparseAutoEncoder.of(sae) if type(sae) is StandardSAE else sae


def load_release(
    release: str, sae_id: str = "", *, registry: str | Path | None = None, force_download: bool = False
) -> SAE:
    """`load` by the names that SAELens uses: a release and an SAE's id in it, or a repository or folder and a path."""
    where = find_release(release, sae_id, registry)
    if where.repo_id is None:
        return load_path(where.folder)
    path = "" if str(where.folder) == "." else where.folder.as_posix()
    name = f"{where.repo_id}/{path}".rstrip("/")
    return _from_hub(where.repo_id, path, SAEDescriptor(name, where.repo_id), None, None, where, force_download).sae


def load_pretrained_sae(
    name_or_repo: str,
    *,
    device: str = "cpu",
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    registry: str | Path | None = None,
) -> tuple[SAE, dict[str, Any]]:
    """An SAE that was published, and what is known of it.

    Args:
        name_or_repo: what `SAE.load` takes.

    Returns:
        `(sae, config)`. The weights are those of the file, whatever format that is in. The config has `name`,
        `hf_repo`, `revision` (the commit), `weights_path`, `license`, `source`, `architecture`, `n_features`, `k`,
        `input_dim`, `hook_site`, `model_name`; what nothing says is None.

    Raises:
        MechintError: a name that nothing has, the Hub out of reach and nothing in the cache, files that are no SAE or
            not what the repository or the registry says of them.
    """
    device = detect_device(device)  # before anything is downloaded
    opened = open_pretrained_sae(name_or_repo, revision=revision, cache_dir=cache_dir, registry=registry)
    return opened.sae.to(device), opened.config


def open_pretrained_sae(
    name_or_repo: str,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    registry: str | Path | None = None,
) -> Pretrained:
    """`load_pretrained_sae` on the CPU, with what was verified. Raises as it does."""
    known = sae_registry(registry)
    descriptor = known.get(name_or_repo)
    if descriptor is not None:
        place = local_place(descriptor)
        if place is not None and place.exists() and revision is None:
            return _from_disk(place, descriptor)
        if descriptor.hf_repo is None:
            where = f"nothing at {place}" if revision is None else f"revision {revision} of which repository?"
            raise MechintError(f"SAE {descriptor.name}: {where}; its registry names no hf_repo")
        repo_id, file = descriptor.hf_repo, descriptor.weights_file
        return _from_hub(repo_id, file, descriptor, revision or descriptor.hf_revision, cache_dir)
    if (place := Path(name_or_repo).expanduser()).exists():
        if revision is not None:
            raise MechintError(f"{name_or_repo} is on this machine: a revision belongs to a repository of the Hub")
        return _from_disk(place, SAEDescriptor(name_or_repo))
    name, _, stated = name_or_repo.partition("@")
    if stated and revision not in (None, stated):
        raise MechintError(f"{name_or_repo} names one revision, and {revision} was asked for: give one of them")
    revision = stated or revision
    name, _, inside = name.partition(":")
    if inside and name in release_names():
        where = find_release(name, inside)
        assert where.repo_id is not None
        found = SAEDescriptor(name_or_repo, where.repo_id)
        return _from_hub(where.repo_id, where.folder.as_posix(), found, revision, cache_dir, where)
    typed_as_path = name.startswith((".", "/", "~")) or "/" not in name
    if not (inside or stated) and (typed_as_path or Path(name).parent.is_dir()):
        names = sorted({*known, *release_names(), *_beside(place)})
        raise MechintError(
            f"unknown SAE {name_or_repo!r}: nothing on this machine, and no name of a registry (`mechint list-saes`"
            f" lists them); {nearest(name_or_repo, names)}. A repository of the Hub is given as user/repo, or"
            " user/repo:FOLDER@REVISION"
        )
    repo_id, path = split_id(
        f"{name}/{inside}" if inside else name,
        f"unknown SAE {name_or_repo!r}: expected a path, a name of a registry, or user/repo:FOLDER@REVISION of the Hub",
    )
    where = Where(Path(path), repo_id, gemma_scope_metadata(repo_id, path))
    return _from_hub(repo_id, path, SAEDescriptor(name_or_repo, repo_id), revision, cache_dir, where)


def _beside(place: Path) -> list[str]:
    """What lies where something was looked for, as it would be typed."""
    parent = place.parent
    return [str(parent / item.name) for item in parent.iterdir()] if parent.is_dir() else []


def _from_disk(place: Path, descriptor: SAEDescriptor) -> Pretrained:
    folder = place if place.is_dir() else place.parent
    bundle = local_bundle(folder)
    names = [name for weights in WEIGHTS for name in (weights, f"{weights}.json")]
    verified = check_hashes(folder, (*names, *BESIDE), bundle, str(folder))
    return _opened(place, descriptor, bundle, verified, None)


def _from_hub(
    repo_id: str,
    path: str,
    descriptor: SAEDescriptor,
    revision: str | None,
    cache_dir: str | Path | None,
    where: Where | None = None,
    again: bool = False,
) -> Pretrained:
    """`where`: what a release, or the repository's name, says of the SAE that its files do not say."""
    repo = open_repo(repo_id, revision=revision, cache_dir=cache_dir)
    weights = find_weights(repo, path)
    folder = PurePosixPath(weights).parent
    beside = {str(folder / name) for name in (*BESIDE, f"{PurePosixPath(weights).name}.json")}
    found = fetch(repo, {weights} | (beside & repo.sizes.keys()), again=again)
    # of several SAEs in one repository, the licence is said of all and the rest of none
    bundle = found.bundle if folder == PurePosixPath(".") else plain_values(found.bundle, ["license"])
    place, descriptor = found.folder / weights, replace(descriptor, hf_repo=repo_id)
    return _opened(place, descriptor, bundle, found.verified, found, where)


def find_weights(repo: Repo, path: str) -> str:
    """The weights' file at `path` (a folder or the file itself) of a repository.

    Raises:
        MechintError: none there; the folders that have some are named.
    """
    if path in repo.sizes and path.endswith(WEIGHT_SUFFIXES):
        return path
    prefix = f"{path}/" if path else ""
    for name in WEIGHTS:
        if f"{prefix}{name}" in repo.sizes:
            return f"{prefix}{name}"
    folders = sorted({str(PurePosixPath(name).parent) for name in repo.sizes if PurePosixPath(name).name in WEIGHTS})
    what = f"holds no SAE at {path!r}" if path else "holds no SAE at its root"
    if not repo.online:
        raise MechintError(
            f"{repo.repo_id} is in the local cache, but no SAE of it ({path or 'at its root'}), and the Hub cannot be"
            " reached: check the network (and HF_ENDPOINT, HF_HUB_OFFLINE)"
        )
    if not folders and "direction.safetensors" in repo.sizes:
        raise MechintError(f"{repo.repo_id} holds a steering vector: load_steering_vector({repo.repo_id!r}) opens it")
    if not folders:
        raise MechintError(
            f"{repo.repo_id} {what}, nor anywhere else: none of its files is one of {', '.join(WEIGHTS)}"
        )
    options = [folder if folder != "." else repo.repo_id for folder in folders]
    raise MechintError(
        f"{repo.repo_id} {what}; give {repo.repo_id}/FOLDER with one of its {len(folders)} folders:"
        f" {nearest(path, options)}"
    )


def _opened(
    place: Path,
    descriptor: SAEDescriptor,
    bundle: dict[str, Any],
    verified: dict[str, str],
    found: Fetched | None,
    where: Where | None = None,
) -> Pretrained:
    """The SAE at `place`, and its config: what the registry says before what the files say."""
    sae = _read(place, descriptor, None if where is None else where.norm_scaling_factor)
    if where is not None and where.metadata:
        sae.metadata = {**sae.metadata, **where.metadata}
    cfg, said = sae.cfg, _said(bundle) | {key: value for key, value in descriptor.config.items() if value is not None}
    stated = {"n_features": cfg.d_sae, "input_dim": cfg.d_in, "k": cfg.k}
    for key, value in stated.items():
        if said.get(key, value) != value:
            raise MechintError(
                f"SAE {descriptor.name}: {key} is {value} in {place.name}, but {said[key]} is stated for it: the"
                " weights of another SAE?"
            )
    # where the files do not say where it belongs, what is stated helps those that put it into a model
    if said.get("processing") is not None and any(ASSUMED in note for note in sae.notes):
        cfg.metadata["processing"] = said["processing"]
        sae.notes = tuple(note for note in sae.notes if ASSUMED not in note)
    for key, ours in (("hook_site", "hook_name"), ("model_name", "model_name"), ("processing", "processing")):
        if cfg.metadata.get(ours) is None and said.get(key) is not None:
            cfg.metadata[ours] = said[key]
    stated_license = plain_values(bundle, ["license"]).get("license")
    licenses = (descriptor.license if descriptor.license != "unknown" else None, stated_license, "unknown")
    config = {
        **descriptor.config,
        "name": descriptor.name,
        "hf_repo": descriptor.hf_repo,
        "revision": None if found is None else found.folder.name,
        "weights_path": str(_weights_at(place) or place),
        "license": next(name for name in licenses if name),
        "source": SOURCE,
        "architecture": str(cfg.architecture),
        **stated,
        "hook_site": said.get("hook_site") or cfg.metadata.get("hook_name"),
        "model_name": said.get("model_name") or cfg.metadata.get("model_name"),
    }
    return Pretrained(sae, config, verified, place)


def _read(place: Path, descriptor: SAEDescriptor, norm_scaling_factor: float | None) -> SAE:
    """The SAE at `place`; what lies nowhere beside it but in a registry is believed from there."""
    folder = place if place.is_dir() else place.parent
    weights, config = _weights_at(place), descriptor.config
    if weights is not None and weights.suffix == ".safetensors":
        alone = not any((folder / name).is_file() for name in ("cfg.json", f"{weights.name}.json"))
        if alone and "n_features" in config:
            if "encoder.weight" in peek_safetensors(weights):
                return mech_platform.read(weights, {key: config.get(key) for key in ("n_features", "k", "input_dim")})
            return saelens.read(weights, _cfg(descriptor))
        if norm_scaling_factor is not None and saelens.peek_cfg(place) is not None:
            return saelens.read(place, {"norm_scaling_factor": norm_scaling_factor})
    return load_path(place)


def _said(bundle: dict[str, Any]) -> dict[str, Any]:
    """Model and hook as the metadata of a bundle name them: in `spec`, as runs of the mech platform do."""
    spec = bundle.get("spec")
    parameters = spec.get("parameters") if isinstance(spec, dict) else None
    parameters = parameters if isinstance(parameters, dict) else {}
    named = {"model_name": parameters.get("model"), "hook_site": parameters.get("hook_site")}
    return {key: value for key, value in named.items() if isinstance(value, str)}


def _weights_at(place: Path) -> Path | None:
    """The file itself, or the weights' file in a folder that has one at its top."""
    if place.is_file():
        return place
    return next((place / name for name in WEIGHTS if (place / name).is_file()), None)


def _cfg(descriptor: SAEDescriptor) -> dict[str, Any]:
    """A cfg.json for weights W_enc, b_enc, W_dec, b_dec that a registry alone describes."""
    config = descriptor.config
    if not isinstance(config.get("apply_b_dec_to_input"), bool):
        raise MechintError(
            f"SAE {descriptor.name}: nothing says whether b_dec is subtracted from its input; its weights have no"
            " cfg.json, so the config of its registry entry needs apply_b_dec_to_input: true or false"
        )
    k = config.get("k")
    return {
        "architecture": "standard",
        "d_in": config.get("input_dim"),
        "d_sae": config["n_features"],
        "activation_fn_str": "relu" if k is None else "topk",
        "activation_fn_kwargs": {} if k is None else {"k": k},
        "apply_b_dec_to_input": config["apply_b_dec_to_input"],
        "model_name": config.get("model_name"),
        "hook_name": config.get("hook_site"),
    }
