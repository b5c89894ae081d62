"""`load_steering_vector`: a direction by its registry name, its repository or its folder, and what is known of it."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from mechint.errors import MechintError, nearest
from mechint.huggingface.fetch import check_hashes, fetch, local_bundle, open_repo, plain_values, split_id
from mechint.huggingface.registry import SteeringVectorDescriptor, local_place, steering_registry
from mechint.provenance import detect_device
from mechint.steering.direction import FILE_NAME, Direction, direction_path, load_direction

KIND = "steering"
# What a registry says of a vector stays, whatever the vector's own sidecar claims: what it is called, what may be done
# with it and where it comes from. Of what was measured the sidecar knows more.
KEPT = ("name", "license", "model_name", "hook_site", "description", "source_run_id", "source_paper", "hf_repo")


@dataclass(frozen=True)
class Vector:
    """A steering vector that was opened.

    Attributes:
        direction: the unit vector, and its sidecar as it lies there.
        metadata: what `load_steering_vector` returns beside it.
        verified: SHA-256 of each file that was held to what the repository states; empty if it states none.
    """

    direction: Direction
    metadata: dict[str, Any]
    verified: dict[str, str]


def load_steering_vector(
    name_or_repo: str,
    *,
    device: str = "cpu",
    base_dir: str | Path | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    registry: str | Path | None = None,
) -> tuple[Float[Tensor, " d_in"], dict[str, Any]]:
    """A steering vector, and what is known of it.

    Args:
        name_or_repo: a name of a registry (`mechint list-steering`); a folder or .safetensors file on this machine; a
            repository of the Hub as `user/repo`, or `user/repo/folder/in/it`.
        base_dir: where relative local paths of a registry count from; the current folder if not given.
        revision: branch, tag or commit of the repository; with one, the local path is not looked at.
        cache_dir: in place of the Hub library's own cache.
        registry: a registry file that is looked into first.

    Returns:
        `(direction, metadata)`: float32, norm 1; and `name`, `kind`, `model_name`, `hook_site`, `direction_norm` (the
        norm before it was divided by it), `description`, `license`, `source_run_id`, `source_paper`, `hf_repo`,
        `revision` (the commit), `local_path`, and the other keys of its sidecar. What a registry states, a sidecar
        does not change.

    Raises:
        MechintError: a name that nothing has, the Hub out of reach and nothing in the cache, files that are no
            direction (no key `direction`, norm not 1) or not what the repository says of them, a sidecar that names
            another hook than the registry.
    """
    device = detect_device(device)  # before anything is downloaded
    opened = open_steering_vector(
        name_or_repo, base_dir=base_dir, revision=revision, cache_dir=cache_dir, registry=registry
    )
    return opened.direction.vector.to(device), opened.metadata


def open_steering_vector(
    name_or_repo: str,
    *,
    base_dir: str | Path | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    registry: str | Path | None = None,
) -> Vector:
    """`load_steering_vector` on the CPU, with the sidecar and what was verified. Raises as it does."""
    known = steering_registry(registry)
    descriptor = known.get(name_or_repo)
    if descriptor is not None:
        place = local_place(descriptor, base_dir)
        if place is not None and direction_path(place).is_file() and revision is None:
            return _from_disk(place, _stated(descriptor))
        if descriptor.hf_repo is None:
            where = f"not at {place}" if place is not None else "nowhere"
            make = f"--model {descriptor.model_name} --hook {descriptor.hook_site} --name {descriptor.name}"
            raise MechintError(
                f"steering vector {descriptor.name} is {where}, and its registry names no hf_repo to get it from; make"
                f" it with `mechint extract-steering {make}`"
            )
        return _from_hub(descriptor.hf_repo, "", _stated(descriptor), revision or descriptor.hf_revision, cache_dir)
    if (place := Path(base_dir or ".") / Path(name_or_repo).expanduser()).exists():
        if revision is not None:
            raise MechintError(f"{name_or_repo} is on this machine: a revision belongs to a repository of the Hub")
        return _from_disk(place, {})
    expected = (
        f"unknown steering vector {name_or_repo!r}: no name of a registry, nothing on this machine and no user/repo;"
        f" {nearest(name_or_repo, known)}; `mechint list-steering` lists them"
    )
    repo_id, path = split_id(name_or_repo, expected)
    return _from_hub(repo_id, path, {}, revision, cache_dir)


def _stated(descriptor: SteeringVectorDescriptor) -> dict[str, Any]:
    """What the registry says, without what it leaves open."""
    said = {part.name: getattr(descriptor, part.name) for part in dataclasses.fields(descriptor)}
    return {
        key: value
        for key, value in said.items()
        if value not in (None, "") and key not in ("local_path", "hf_revision")
    }


def _from_hub(
    repo_id: str, path: str, stated: dict[str, Any], revision: str | None, cache_dir: str | Path | None
) -> Vector:
    repo = open_repo(repo_id, revision=revision, cache_dir=cache_dir)
    weights = path if path.endswith(".safetensors") else f"{path}/{FILE_NAME}".lstrip("/")
    if weights not in repo.sizes:
        others = [name for name in repo.sizes if name.endswith(".safetensors")]
        near = f"; {nearest(weights, others)}" if others else ", nor any other .safetensors file"
        raise MechintError(f"{repo_id} has no {weights}{near}: not a steering vector")
    found = fetch(repo, {weights} | ({f"{weights}.json"} & repo.sizes.keys()))
    # of several vectors in one repository, the licence is said of all and the rest of none
    keys = [key for key in KEPT if key != "hf_repo"] if weights == FILE_NAME else ["license"]
    said = plain_values(found.bundle, keys)
    return _opened(
        found.folder / weights,
        {**said, **stated, "hf_repo": repo_id},
        revision=found.folder.name,
        verified=found.verified,
    )


def _from_disk(place: Path, stated: dict[str, Any]) -> Vector:
    """A direction on this machine; a folder that `mechint pull` wrote says whose bundle it is, and its hashes."""
    file = direction_path(place)
    bundle = local_bundle(file.parent)
    verified = check_hashes(file.parent, (file.name, f"{file.name}.json"), bundle, str(file.parent))
    said = plain_values(bundle, KEPT)
    return _opened(file, {**said, **stated}, verified=verified)


def _opened(file: Path, stated: dict[str, Any], *, verified: dict[str, str], revision: str | None = None) -> Vector:
    """The direction in a file and its metadata: what is stated before what the sidecar says."""
    direction = load_direction(file)
    info = direction.info
    ours = {key: value for key, value in stated.items() if key in KEPT and value is not None}
    sidecar_hook = info.get("hook_site")
    if sidecar_hook is not None and ours.get("hook_site", sidecar_hook) != sidecar_hook:
        raise MechintError(
            f"steering vector {ours.get('name', file)}: {ours['hook_site']} is stated for it, but its sidecar says"
            f" {sidecar_hook}: the file of another vector?"
        )
    metadata = {
        "name": direction.name,
        "model_name": info.get("model"),
        "hook_site": None,
        "direction_norm": stated.get("direction_norm"),
        "description": "",
        "license": "unknown",
        "source_run_id": None,
        "source_paper": None,
        "hf_repo": None,
        **info,
        **ours,
        "kind": KIND,
        "revision": revision,
        "local_path": str(file),
    }
    metadata["license"] = metadata["license"] or "unknown"
    return Vector(direction, metadata, verified)
