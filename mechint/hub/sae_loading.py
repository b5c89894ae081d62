"""`load_pretrained_sae`: an SAE by its registry name, its repository or its folder, and what is known of it."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from mechint.errors import MechintError, nearest
from mechint.formats.files import BESIDE, WEIGHTS
from mechint.hub.fetch import Fetched, Repo, check_hashes, fetch, local_bundle, open_repo, plain_values, split_id
from mechint.hub.registry import SAEDescriptor, local_place, sae_registry
from mechint.provenance import detect_device, write_json
from mechint.saelens import SAE

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
        name_or_repo: a name of a registry (`mechint list-saes`); a folder or file on this machine; a repository of the
            Hub as `user/repo`, or `user/repo/folder/in/it`.
        revision: branch, tag or commit of the repository.
        cache_dir: in place of the Hub library's own cache.
        registry: a registry file that is looked into first.

    Returns:
        `(sae, config)`. The SAE is a `mechint.saelens.SAE`: `encode`, `decode`, `W_enc`, `cfg`; its weights are those
        of the file, whatever format that is in. The config has `name`, `hf_repo`, `revision` (the commit),
        `weights_path`, `license`, `source`, `architecture`, `n_features`, `k`, `input_dim`, `hook_site`,
        `model_name`; what nothing says is None.

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
    expected = (
        f"unknown SAE {name_or_repo!r}: no name of a registry, nothing on this machine and no user/repo;"
        f" {nearest(name_or_repo, known)}; `mechint list-saes` lists them"
    )
    repo_id, path = split_id(name_or_repo, expected)
    return _from_hub(repo_id, path, SAEDescriptor(name_or_repo, repo_id), revision, cache_dir)


def _from_disk(place: Path, descriptor: SAEDescriptor) -> Pretrained:
    folder = place if place.is_dir() else place.parent
    bundle = local_bundle(folder)
    names = [name for weights in WEIGHTS for name in (weights, f"{weights}.json")]
    verified = check_hashes(folder, (*names, *BESIDE), bundle, str(folder))
    return _opened(place, descriptor, bundle, verified, None)


def _from_hub(
    repo_id: str, path: str, descriptor: SAEDescriptor, revision: str | None, cache_dir: str | Path | None
) -> Pretrained:
    repo = open_repo(repo_id, revision=revision, cache_dir=cache_dir)
    weights = find_weights(repo, path)
    folder = PurePosixPath(weights).parent
    beside = {str(folder / name) for name in (*BESIDE, f"{PurePosixPath(weights).name}.json")}
    found = fetch(repo, {weights} | (beside & repo.sizes.keys()))
    # of several SAEs in one repository, the licence is said of all and the rest of none
    bundle = found.bundle if folder == PurePosixPath(".") else plain_values(found.bundle, ["license"])
    return _opened(found.folder / weights, replace(descriptor, hf_repo=repo_id), bundle, found.verified, found)


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
    place: Path, descriptor: SAEDescriptor, bundle: dict[str, Any], verified: dict[str, str], found: Fetched | None
) -> Pretrained:
    """The SAE at `place`, and its config: what the registry says before what the files say."""
    with _described(place, descriptor) as described:
        # this one format is known by two files of a folder, all others by their weights too
        sae = SAE.load_from_disk(described.parent if described.name == "sae.safetensors" else described)
    cfg, said = sae.cfg, _said(bundle) | {key: value for key, value in descriptor.config.items() if value is not None}
    stated = {"n_features": cfg.d_sae, "input_dim": cfg.d_in, "k": cfg.k}
    for key, value in stated.items():
        if said.get(key, value) != value:
            raise MechintError(
                f"SAE {descriptor.name}: {key} is {value} in {place.name}, but {said[key]} is stated for it: the"
                " weights of another SAE?"
            )
    # where the files do not say where it belongs, what is stated helps those that put it into a model
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


@contextlib.contextmanager
def _described(place: Path, descriptor: SAEDescriptor) -> Iterator[Path]:
    """`place`, or where its settings lie nowhere beside it but in a registry, a folder that has them as a file."""
    folder = place if place.is_dir() else place.parent
    weights = _weights_at(place)
    config = descriptor.config
    bare = weights is not None and weights.name.endswith(".safetensors") and "n_features" in config
    if weights is None or not bare or any((folder / name).is_file() for name in ("cfg.json", f"{weights.name}.json")):
        yield place
        return
    from mechint.formats.files import peek_safetensors

    with tempfile.TemporaryDirectory() as temporary:
        made = Path(temporary) / "sae_weights.safetensors"
        os.symlink(weights.resolve(), made)
        if "encoder.weight" in peek_safetensors(made):
            sidecar = {key: config.get(key) for key in ("n_features", "k", "input_dim")}
            write_json(made.with_name(made.name + ".json"), sidecar)
        else:
            write_json(made.with_name("cfg.json"), _cfg(descriptor))
        yield Path(temporary)


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
