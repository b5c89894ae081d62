"""Names for SAEs and steering vectors: where each one lies, and what it is. Nothing is opened or downloaded here.

A registry file is JSON with one or both of two keys; the fields of an entry are those of the descriptors below:

    {"saes": {"my-sae": {"hf_repo": "user/repo", "weights_file": "layer_3/sae_weights.safetensors", "license": "MIT"}},
     "steering_vectors": {"my-vector": {"model_name": "gpt2-medium", "hook_site": "blocks.8.hook_resid_pre",
                                        "direction_norm": 15.4, "license": "MIT", "hf_repo": "user/repo"}}}

Of several entries with one name, the first of these counts: the file that is passed (`registry=`, `--registry`), what
was put into SAE_REGISTRY or STEERING_REGISTRY in Python, the files that MECHINT_REGISTRY names (the first one first),
mechint-registry.json in the current folder, and the entries that come with the package.
"""

import dataclasses
import json
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from mechint.errors import MechintError, nearest
from mechint.provenance import read_json

VARIABLE = "MECHINT_REGISTRY"
FILE_NAME = "mechint-registry.json"
SAES, VECTORS = "saes", "steering_vectors"
DATA = Path(__file__).resolve().parent / "registry_data"


@dataclass(frozen=True)
class SAEDescriptor:
    """An SAE by name.

    Attributes:
        hf_repo: repository of the Hub, `user/repo`.
        weights_file: path of its weights in the repository; the other files are those beside it.
        config: what is known of it: n_features, k (null for ReLU), input_dim, hook_site, model_name. The files are held
            to it, and it says what they do not say themselves.
        license: as its makers call it.
        hf_revision: branch, tag or commit; the newest if none.
        local_path: where it lies on this machine, looked at before the Hub: a folder or a file.
    """

    name: str
    hf_repo: str | None = None
    weights_file: str = "sae_weights.safetensors"
    config: dict[str, Any] = field(default_factory=dict)
    license: str = "unknown"
    hf_revision: str | None = None
    description: str = ""
    local_path: str | Path | None = None


@dataclass(frozen=True)
class SteeringVectorDescriptor:
    """A steering vector by name.

    Attributes:
        direction_norm: the norm it had before it was divided by it; stored vectors have norm 1.
        hf_repo: repository of the Hub that holds `direction.safetensors` and its sidecar, `user/repo`.
        local_path: where it lies on this machine, looked at before the Hub: a folder or a .safetensors file.
        hf_revision: branch, tag or commit; the newest if none.
    """

    name: str
    model_name: str
    hook_site: str
    direction_norm: float | None
    description: str
    license: str
    source_run_id: int | str | None = None
    source_paper: str | None = None
    hf_repo: str | None = None
    local_path: str | Path | None = None
    hf_revision: str | None = None


DescriptorT = TypeVar("DescriptorT", SAEDescriptor, SteeringVectorDescriptor)
# An entry of a file may leave these out.
_DEFAULTS: dict[str, Any] = {"description": "", "license": "unknown", "direction_norm": None}


def read_registry(path: str | Path) -> tuple[dict[str, SAEDescriptor], dict[str, SteeringVectorDescriptor]]:
    """The SAEs and the steering vectors of a registry file. A relative `local_path` counts from the file's folder.

    Raises:
        MechintError: no such file, not JSON, an unknown or missing key, or a value of the wrong kind.
    """
    path = Path(path)
    found = read_json(path, "registry file")
    for key in found:
        if key not in (SAES, VECTORS):
            raise MechintError(f"registry file {path}: unknown key {key!r}; valid: {SAES}, {VECTORS}")
    return _entries(SAEDescriptor, found, SAES, path), _entries(SteeringVectorDescriptor, found, VECTORS, path)


def _entries(cls: type[DescriptorT], found: Mapping[str, Any], key: str, path: Path) -> dict[str, DescriptorT]:
    entries = found.get(key, {})
    if not isinstance(entries, dict):
        raise MechintError(f"registry file {path}: {key} should be an object, one entry a name")
    return {name: _descriptor(cls, name, entry, path) for name, entry in entries.items()}


def _descriptor(cls: type[DescriptorT], name: str, entry: Any, path: Path) -> DescriptorT:
    where = f"registry file {path}: {name}"
    if not isinstance(entry, dict):
        raise MechintError(f"{where} should be an object, found {json.dumps(entry)[:40]}")
    fields = {part.name: part for part in dataclasses.fields(cls) if part.name != "name"}
    for key, value in entry.items():
        if key not in fields:
            raise MechintError(f"{where}: unknown key {key!r}; {nearest(key, fields)}")
        if not _fits(value, kind := fields[key].type):
            raise MechintError(f"{where}: {key} should be {_in_words(kind)}, found {json.dumps(value)[:40]}")
    given = {key: value for key, value in _DEFAULTS.items() if key in fields} | entry
    missing = [key for key, part in fields.items() if key not in given and part.default is dataclasses.MISSING]
    missing = [key for key in missing if fields[key].default_factory is dataclasses.MISSING]
    if not (given.get("hf_repo") or given.get("local_path")):
        missing.append("hf_repo or local_path")
    if missing:
        raise MechintError(f"{where}: missing {', '.join(missing)}")
    if given.get("direction_norm") is not None:
        given["direction_norm"] = float(given["direction_norm"])  # JSON writes 12.0 as 12
    if given.get("local_path") is not None and DATA not in path.resolve().parents:
        # what comes with the package lies in no folder of the package, but counts from the current one
        given["local_path"] = path.resolve().parent / Path(given["local_path"]).expanduser()
    return cls(name=name, **given)


def _fits(value: Any, kind: Any) -> bool:
    """Whether a JSON value is one of the field's kinds."""
    if isinstance(kind, types.UnionType):
        return any(_fits(value, option) for option in typing.get_args(kind))
    if kind is Path:
        return False  # JSON has strings only
    kind = typing.get_origin(kind) or kind
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, kind) and not (kind is int and isinstance(value, bool))


def _in_words(kind: Any) -> str:
    names = {str: "a string", int: "a number", float: "a number", dict: "an object", types.NoneType: "null"}
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    words = [names[typing.get_origin(option) or option] for option in options if option is not Path]
    return " or ".join(dict.fromkeys(words))


def _shipped() -> tuple[dict[str, SAEDescriptor], dict[str, SteeringVectorDescriptor]]:
    saes: dict[str, SAEDescriptor] = {}
    vectors: dict[str, SteeringVectorDescriptor] = {}
    for path in sorted(DATA.glob("*.json")):
        found = read_registry(path)
        saes |= found[0]
        vectors |= found[1]
    return saes, vectors


# What comes with the package, and what a program adds to it.
SAE_REGISTRY: dict[str, SAEDescriptor]
STEERING_REGISTRY: dict[str, SteeringVectorDescriptor]
SAE_REGISTRY, STEERING_REGISTRY = _shipped()
_SHIPPED_SAES, _SHIPPED_VECTORS = dict(SAE_REGISTRY), dict(STEERING_REGISTRY)


def sae_registry(registry: str | Path | None = None) -> dict[str, SAEDescriptor]:
    """Every SAE that has a name here; `registry` is one more file, which counts most.

    Raises:
        MechintError: a registry file that is missing or broken.
    """
    files = [read_registry(path)[0] for path in _files()]
    return _merged(SAE_REGISTRY, _SHIPPED_SAES, files, read_registry(registry)[0] if registry is not None else {})


def steering_registry(registry: str | Path | None = None) -> dict[str, SteeringVectorDescriptor]:
    """Every steering vector that has a name here; `registry` is one more file, which counts most.

    Raises:
        MechintError: a registry file that is missing or broken.
    """
    files = [read_registry(path)[1] for path in _files()]
    passed = read_registry(registry)[1] if registry is not None else {}
    return _merged(STEERING_REGISTRY, _SHIPPED_VECTORS, files, passed)


def _files() -> list[Path]:
    """The registry files that are found by themselves, the one that counts least first."""
    named = [Path(name).expanduser() for name in os.environ.get(VARIABLE, "").split(os.pathsep) if name]
    here = Path(FILE_NAME)
    return ([here] if here.is_file() else []) + named[::-1]


def _merged(
    in_python: Mapping[str, DescriptorT],
    shipped: Mapping[str, DescriptorT],
    files: list[dict[str, DescriptorT]],
    passed: Mapping[str, DescriptorT],
) -> dict[str, DescriptorT]:
    added = {name: entry for name, entry in in_python.items() if shipped.get(name) is not entry}
    found = dict(in_python)
    for entries in [*files, added, passed]:
        found |= entries
    return dict(sorted(found.items()))


def local_place(
    descriptor: SAEDescriptor | SteeringVectorDescriptor, base_dir: str | Path | None = None
) -> Path | None:
    """The descriptor's local path, whether something is there or not; relative ones count from `base_dir`, or from the
    current folder."""
    if descriptor.local_path is None:
        return None
    return Path(base_dir or ".") / Path(descriptor.local_path).expanduser()


def source_in_words(descriptor: SAEDescriptor | SteeringVectorDescriptor, base_dir: str | Path | None = None) -> str:
    """Where the files would come from: the local path if they are there, else the Hub's repository."""
    place = local_place(descriptor, base_dir)
    if place is not None and place.exists():
        return str(place)
    if descriptor.hf_repo is None:
        return f"not here: {place}" if place is not None else "nowhere"
    return f"Hub: {descriptor.hf_repo}" + (f" at {descriptor.hf_revision}" if descriptor.hf_revision else "")
