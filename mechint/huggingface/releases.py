"""From `release` and `sae_id` to a folder: registry files, the Hugging Face Hub, the local disk.

A registry file is JSON or YAML in the layout of SAELens's own list, which is found by itself where it is installed:

    {"my-release": {"repo_id": "user/repo", "model": "pythia-70m",
                    "saes": [{"id": "blocks.3.hook_resid_post", "path": "layer_3", "neuronpedia": "pythia-70m/3-me"}]}}

Files are looked into in this order: the one that is passed, those that MECHINT_SAE_REGISTRY names, SAELens's, and
last the few releases that are known here without any file.
"""

import functools
import importlib.util
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mechint.errors import MechintError, nearest, one_line
from mechint.huggingface.fetch import is_inside

VARIABLE = "MECHINT_SAE_REGISTRY"
_RESID = "blocks.{layer}.hook_resid_pre"


def _series(model: str, source: str, hook: str, layers: range, path: str) -> list[dict[str, str]]:
    """One SAE a layer, named by its hook."""
    return [
        {
            "id": hook.format(layer=layer),
            "path": path.format(layer=layer, hook=hook.format(layer=layer)),
            "neuronpedia": f"{model}/{layer}-{source}",
        }
        for layer in layers
    ]


# What SAELens's list says of releases that documents use as examples.
KNOWN: dict[str, dict[str, Any]] = {
    "gpt2-small-res-jb": {
        "repo_id": "jbloom/GPT2-Small-SAEs-Reformatted",
        "model": "gpt2-small",
        "config_overrides": {"model_from_pretrained_kwargs": {"center_writing_weights": True}},
        "saes": _series("gpt2-small", "res-jb", _RESID, range(12), "{hook}"),
    },
    "pythia-70m-deduped-res-sm": {
        "repo_id": "ctigges/pythia-70m-deduped__res-sm_processed",
        "model": "pythia-70m-deduped",
        "saes": _series("pythia-70m-deduped", "res-sm", "blocks.{layer}.hook_resid_post", range(6), "{layer}-res-sm"),
    },
}


@dataclass(frozen=True)
class Where:
    """Where an SAE's files are: below `folder` of the Hub repository `repo_id`, or (without one) at `folder`."""

    folder: Path
    repo_id: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    norm_scaling_factor: float | None = None


def find_release(release: str, sae_id: str, registry: str | Path | None = None) -> Where:
    """Where `release` and `sae_id` lead. Nothing is downloaded.

    Raises:
        MechintError: a name that no registry file has and that is neither a repository nor a folder; an unknown id.
    """
    sae_id = sae_id.strip("/")
    if sae_id and not is_inside(sae_id):
        raise MechintError(f"sae_id {sae_id!r} should be a path inside {release}, without '..' or a leading '/'")
    known = dict(_releases(registry))
    if release in known:
        return _in_release(release, known[release], sae_id)
    local = Path(release).expanduser()
    if local.exists():
        return Where(local / sae_id if sae_id else local)
    parts = release.split("/")
    if len(parts) != 2 or not all(parts) or release.startswith((".", "~")):
        raise MechintError(
            f"{release!r} is no release that is known here, no user/repo and no folder; {nearest(release, known)}."
            f" More releases: a registry file, as {VARIABLE} or registry=..."
        )
    return Where(Path(sae_id), release, gemma_scope_metadata(release, sae_id))


def release_names(registry: str | Path | None = None) -> list[str]:
    """Names of all releases that are known."""
    return sorted(dict(_releases(registry)))


def gemma_scope_metadata(repo_id: str, path: str) -> dict[str, Any]:
    """What the names of Gemma Scope's repositories and folders say, which its files do not: the model and the hooks.
    Empty for other repositories."""
    found = re.fullmatch(r"google/gemma-scope-(\d+b)-(pt|it)-(res|mlp|att|transcoders)", repo_id)
    layer = re.match(r"layer_(\d+)/", path)
    if found is None or (layer is None and not (found[3] == "res" and path.startswith("embedding/"))):
        return {}
    hooks = {
        "res": "hook_resid_post",
        "mlp": "hook_mlp_out",
        "att": "attn.hook_z",
        "transcoders": "ln2.hook_normalized",
    }
    block = f"blocks.{layer[1]}." if layer else ""
    metadata = {
        "model_name": f"gemma-2-{found[1]}" + ("-it" if found[2] == "it" else ""),
        "hook_name": block + hooks.get(found[3], "ln2.hook_normalized") if layer else "hook_embed",
        "prepend_bos": True,
        "context_size": 1024,
        "dataset_path": "monology/pile-uncopyrighted",
    }
    return metadata | ({"hook_name_out": f"{block}hook_mlp_out"} if found[3] == "transcoders" else {})


def _in_release(release: str, entry: Mapping[str, Any], sae_id: str) -> Where:
    saes = {str(item["id"]): item for item in entry["saes"]}
    if sae_id not in saes:
        raise MechintError(f"release {release} has no SAE {sae_id!r}; {nearest(sae_id, saes)}")
    item = saes[sae_id]
    path = str(item.get("path", sae_id)).strip("/")
    if not is_inside(path):
        raise MechintError(f"release {release}: the path {path!r} of {sae_id} does not lie in the repository")
    metadata = gemma_scope_metadata(str(entry["repo_id"]), path) | dict(entry.get("config_overrides") or {})
    if "model" in entry:
        metadata.setdefault("model_name", entry["model"])
    if item.get("neuronpedia"):
        metadata["neuronpedia_id"] = item["neuronpedia"]
    if (metadata.get("model_from_pretrained_kwargs") or {}).get("center_writing_weights"):
        metadata["processing"] = "centred"
    return Where(Path(path), str(entry["repo_id"]), metadata, item.get("norm_scaling_factor"))


def _releases(registry: str | Path | None) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """All releases; of several with one name, the one that counts comes last."""
    yield from KNOWN.items()
    spec = importlib.util.find_spec("sae_lens")
    if spec is not None and spec.origin is not None:
        theirs = Path(spec.origin).parent / "pretrained_saes.yaml"
        if theirs.is_file():
            yield from _read_registry(theirs).items()
    for name in reversed([name for name in os.environ.get(VARIABLE, "").split(os.pathsep) if name]):
        yield from _read_registry(Path(name)).items()
    if registry is not None:
        yield from _read_registry(Path(registry)).items()


@functools.cache
def _read_registry(path: Path) -> dict[str, Mapping[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            found = json.loads(text)
        else:
            import yaml

            found = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except FileNotFoundError:
        raise MechintError(f"registry file not found: {path}") from None
    except (OSError, ValueError, ImportError) as error:
        raise MechintError(f"registry file {path} cannot be read: {one_line(error, 160)}") from error
    except Exception as error:  # yaml's errors have no common class with the others
        raise MechintError(f"registry file {path} is not JSON or YAML: {one_line(error, 160)}") from error
    whole = isinstance(found, dict) and all(
        isinstance(entry, dict)
        and isinstance(entry.get("repo_id"), str)
        and isinstance(entry.get("saes"), list)
        and all(isinstance(item, dict) and "id" in item for item in entry["saes"])
        for entry in found.values()
    )
    if not whole:
        raise MechintError(f"registry file {path}: each release needs repo_id and a list saes, each with id and path")
    return found
