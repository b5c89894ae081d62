"""What is published of a steering vector: `direction.safetensors`, its sidecar, and what its registry says of it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mechint.errors import MechintError, nearest
from mechint.hub.bundle import Bundle, StagedFile
from mechint.hub.card import Card, measures_of, render_card
from mechint.hub.license import SAE_LICENSE
from mechint.hub.sae_bundle import plain_name
from mechint.hub.sae_card import base_model_id
from mechint.hub.sae_files import finite
from mechint.huggingface.registry import SteeringVectorDescriptor, local_place, steering_registry
from mechint.steering.direction import FILE_NAME, Direction, direction_path, load_direction, sidecar_path

SIDECAR = f"{FILE_NAME}.json"
# What a registry says of a vector: a sidecar does not change it.
STATED = ("name", "model_name", "hook_site", "direction_norm", "description", "source_run_id", "source_paper")
MEASURES = (
    ("direction_norm", "activation", "norm of the vector before it was divided by it"),
    (
        "extraction_quality",
        "standard deviations",
        "distance of the two classes' mean projections, over the sum of their standard deviations",
    ),
    ("heldout_accuracy", "fraction", "share of prompts that directions made without them put in the right class"),
    ("mean_activation_norm", "activation", "mean norm of activations there: a coefficient of 1 in its unit"),
)
# Keys of a sidecar that the card shows elsewhere or not at all.
_SHOWN = {*STATED, *(key for key, _, _ in MEASURES), "model", "license", "sha256", "hidden_dim", "kind"}


def steering_bundle(
    vector: str | Path,
    *,
    license: str | None = None,
    base_dir: str | Path | None = None,
    registry: str | Path | None = None,
) -> Bundle:
    """The bundle of a vector: a name of a registry, a folder with direction.safetensors, or such a file.

    Args:
        license: in place of the one that the registry states, or else the sidecar.
        base_dir: where relative paths of a registry count from; the current folder if not given.

    Raises:
        MechintError: an unknown name, a vector that is not on this machine, files that are no direction of norm 1, or a
            sidecar that belongs to another model or hook than the registry states.
    """
    known = steering_registry(registry)
    descriptor = known.get(str(vector))
    place = find_direction(str(vector), descriptor, known, base_dir)
    direction = load_direction(place)
    stated = stated_of(descriptor, direction, place)
    license = license or str((descriptor.license if descriptor else direction.info.get("license")) or SAE_LICENSE)
    if license == "unknown":
        license = SAE_LICENSE
    files: dict[str, Path | bytes] = {FILE_NAME: place}
    if sidecar_path(place).is_file():
        files[SIDECAR] = sidecar_path(place)
    name = str(stated["name"])
    return Bundle(
        kind="steering",
        name=name,
        files=files,
        license=license,
        card=lambda repo_id, staged: steering_card(name, repo_id, staged, direction, stated, license),
        metadata=finite({**direction.info, **stated, "hidden_dim": direction.d_in}),
        check=lambda folder: same_direction(direction, folder),
        check_files=tuple(files),
        roots=(place.parent.resolve(),),
    )


def find_direction(
    vector: str,
    descriptor: SteeringVectorDescriptor | None,
    known: Mapping[str, Any],
    base_dir: str | Path | None = None,
) -> Path:
    """The .safetensors file that a name or a path means. Raises `MechintError` if it is not on this machine."""
    if descriptor is not None:
        place = local_place(descriptor, base_dir)
        if place is not None and direction_path(place).is_file():
            return direction_path(place)
        where = f"not at {direction_path(place)}" if place is not None else "not on this machine"
        elsewhere = f"; it is published as {descriptor.hf_repo} already" if descriptor.hf_repo else ""
        raise MechintError(
            f"steering vector {descriptor.name} is {where}, so there is nothing to upload{elsewhere}; make it with"
            " `mechint extract-steering`, or give --vector its folder"
        )
    path = Path(vector).expanduser()
    if path.exists() or path.suffix == ".safetensors" or path.is_absolute():
        return direction_path(path)
    raise MechintError(
        f"unknown steering vector {vector!r}: no name of a registry and no folder; {nearest(vector, known)};"
        " `mechint list-steering` lists them"
    )


def stated_of(descriptor: SteeringVectorDescriptor | None, direction: Direction, place: Path) -> dict[str, Any]:
    """Name, model, hook and origin of a vector: as its registry states them, else its sidecar.

    Raises:
        MechintError: the sidecar names another model or hook than the registry.
    """
    info = direction.info
    said = {key: info.get(key) for key in STATED} | {"model_name": info.get("model_name") or info.get("model")}
    if descriptor is None:
        name = said["name"] or (place.parent.name if place.name == FILE_NAME else place.stem)
        return {**said, "name": str(name or "direction"), "description": said["description"] or ""}
    for key in ("model_name", "hook_site"):
        ours, theirs = getattr(descriptor, key), said[key]
        if ours and theirs and (base_model_id(ours) or ours) != (base_model_id(theirs) or theirs):
            raise MechintError(
                f"steering vector {descriptor.name}: its registry states {key} {ours}, its sidecar {theirs}: is that"
                " the file of another vector? Correct one of them before it is published"
            )
    # of what was measured the sidecar knows more: a registry rounds
    stated = {key: getattr(descriptor, key) for key in STATED} | {"direction_norm": said["direction_norm"]}
    stated["direction_norm"] = stated["direction_norm"] or descriptor.direction_norm
    return {key: said[key] if value in (None, "") else value for key, value in stated.items()}


def steering_repo_name(name: str) -> str:
    """`sv-sentiment-gpt2-medium-l8`."""
    return plain_name("sv-" + name.replace(".", "-").replace("/", "-"))


def same_direction(local: Direction, folder: Path) -> None:
    """Raise `MechintError` unless the direction in `folder`, just downloaded, is the local one."""
    if not torch.equal(load_direction(folder).vector, local.vector):
        raise MechintError("the direction that was downloaded again is not the local one: publish it again")


def steering_card(
    name: str,
    repo_id: str,
    staged: Mapping[str, StagedFile],
    direction: Direction,
    stated: Mapping[str, Any],
    license: str,
) -> str:
    """README.md of a steering vector's bundle."""
    model, hook, info = stated.get("model_name"), stated.get("hook_site"), direction.info
    where = f"{hook} of {model}" if hook and model else "a model that its files do not name"
    lead = str(stated.get("description") or "").strip() or f"A steering direction at {where}."
    facts = [
        ("Model", model),
        ("Hook", hook),
        ("Width", direction.d_in),
        ("Norm", "1; the raw norm is below" if stated.get("direction_norm") else "1"),
        ("Processing", info.get("processing")),
        ("Prompts", _prompts(info)),
    ]
    others = [
        (key, value)
        for key, value in sorted(info.items())
        if key not in _SHOWN and not key.endswith("_prompt_count") and isinstance(value, (str, int, float, bool))
    ]
    provenance = [("source run", stated.get("source_run_id")), ("source paper", stated.get("source_paper")), *others]
    return render_card(
        Card(
            title=name,
            lead=lead,
            kind_tag="steering-vector",
            tags=(str(model).split("/")[-1],) if model else (),
            license=license,
            base_model=base_model_id(model),
            facts=tuple((label, str(value)) for label, value in facts if value is not None),
            measures=measures_of({**info, **stated}, MEASURES),
            usage=_usage(repo_id),
            after_usage=_in_words(repo_id, model),
            provenance=tuple((label, str(value)) for label, value in provenance if value not in (None, "")),
        ),
        staged,
    )


def _prompts(info: Mapping[str, Any]) -> str | None:
    counts = {key.removesuffix("_prompt_count"): value for key, value in info.items() if key.endswith("_prompt_count")}
    return ", ".join(f"{value} {word}" for word, value in sorted(counts.items())) or None


def _usage(repo_id: str) -> str:
    return f"""from mechint.hub import load_steering_vector

direction, metadata = load_steering_vector("{repo_id}")
print(direction.shape, float(direction.norm()), metadata["direction_norm"])"""


def _in_words(repo_id: str, model: Any) -> str:
    text = (
        "`direction` is a float32 vector of norm 1; add `coefficient * direction` to the activation at the hook. With"
        " the coefficient in multiples of `metadata['direction_norm']`, that is the raw vector."
    )
    if model is None:
        return text
    folder = repo_id.split("/")[-1]
    return (
        f"{text}\n\n```bash\nmechint pull {repo_id} --output {folder}\n"
        f'mechint steer --direction {folder} --coefficients 0.5 --prompts "Once there was"\n```'
    )
