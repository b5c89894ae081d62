"""A download from the Hub: exactly one SAE's files, with true byte progress, verified, then ingested.

A folder's own files are taken, settings before weights, so that what is wrong with them is known before gigabytes are
moved. `fetch` moves the bytes.
"""

import contextlib
from pathlib import PurePosixPath
from typing import Any

from mechint.huggingface.client import hub_api
from mechint.huggingface.files import Listed, listed
from mechint.server import storage
from mechint.server.errors import ServiceError, config_not_found, from_hub, path_not_found
from mechint.server.fetch import fetch
from mechint.server.ingest import ingest
from mechint.server.jobs import OUR_MISTAKES, Running, Stop, is_gone
from mechint.server.storage import relative_name

WEIGHTS = (".safetensors", ".npz", ".pt", ".pth")
# JSON files that belong to an SAE are small.
MAX_JSON_BYTES = 64 << 20
# Of models and optimizers, which may lie beside an SAE.
OTHERS = ("model.", "model-", "pytorch_model", "adapter_", "optimizer", "scheduler", "training_args", "tokenizer")
OTHERS += ("special_tokens", "vocab", "generation_config", "rng_state", "added_tokens")
# Weights that say nothing without a cfg.json; mech's own have a file of their name with .json instead.
BARE = {"sae_weights.safetensors": "sae_weights.safetensors.json", "sae.safetensors": "sae.safetensors.json"}


def run_download(running: Running) -> None:
    """The job `download`."""
    repo_id, filepath = running.params["repo_id"], relative_name(running.params["filepath"])
    revision = running.params.get("revision")
    token = hub_token(running)
    running.report("download", 0.0, "Looking at the repository", always=True)
    api = hub_api(token)
    try:
        commit = str(api.model_info(repo_id, revision=revision).sha)
        running.check()
        wanted, is_directory = files_of(api, repo_id, filepath, commit)
    except (Stop, ServiceError, *OUR_MISTAKES):
        raise
    except Exception as error:  # the HTTP library's classes differ between versions of huggingface_hub
        raise from_hub(error, repo_id, revision=revision, what="reading") from None
    total = sum(file.size for file in wanted)
    storage.check_room(running.settings, total, f"{repo_id}/{filepath}")
    staged = storage.stage(running.settings, running.id, running.attempt, take_over=is_gone(running.previous_worker))
    fetch(running, repo_id, commit, wanted, staged / "repo", token)
    original = staged / "original"
    original.mkdir()
    for file in wanted:
        storage.link(staged / "repo" / file.path, original / file.name)
    source = {"repo_id": repo_id, "filepath": filepath, "commit": commit}
    files = [file._asdict() | {"path": file.name} for file in wanted]
    more = {"files_downloaded": files, "is_directory": is_directory, "commit_hash": commit}
    ingest(running, staged, source=source, more=more)


def hub_token(running: Running) -> str | bool:
    """The request's token; for requests without one the server's own, where the settings allow it; else none (False).

    Raises:
        ServiceError: the request came with a token that is not kept any more; no other one stands in for it.
    """
    if running.token:
        return running.token
    if running.params.get("with_token"):
        raise ServiceError(
            "token_expired", "The access_token of this job is not kept any more", "retry with access_token", status=401
        )
    if not running.settings.uses_server_token:
        return False
    from huggingface_hub import get_token

    return get_token() or False


def files_of(api: Any, repo_id: str, filepath: str, commit: str) -> tuple[list[Listed], bool]:
    """`(files, whether filepath is a folder)` of the one SAE at a path of a repository, settings before weights.

    A folder's own files are taken, not those of `layer_10` for `layer_1`, nor those of folders below; but where the
    only SAE lies in one folder below, that is meant.

    Raises:
        ServiceError: Path not found in repository, Config file not found, or several SAEs below the path.
    """
    is_directory = True
    if filepath == ".":
        folder = ""
    else:
        entries = api.get_paths_info(repo_id, [filepath], revision=commit)
        if not entries:
            raise path_not_found(repo_id, filepath)
        is_directory = not hasattr(entries[0], "size")
        folder = filepath if is_directory else parent_of(filepath)
    found = [file for file in list_folder(api, repo_id, folder, commit, recursive=False) if belongs(file)]
    if not is_directory and PurePosixPath(filepath).name not in (*BARE, "cfg.json"):
        # one of several weights in a folder: with the settings beside it
        found = [file for file in found if file.path == filepath or file.name.endswith(".json")]
    if is_directory and not has_weights(found):
        below: dict[str, list[Listed]] = {}
        for file in list_folder(api, repo_id, folder, commit, recursive=True):
            if belongs(file):
                below.setdefault(parent_of(file.path), []).append(file)
        places = sorted(place for place, files in below.items() if has_weights(files))
        if len(places) > 1:
            shown = ", ".join(places[:8]) + (", ..." if len(places) > 8 else "")
            raise ServiceError(
                "several_saes",
                f"{filepath} in {repo_id} holds {len(places)} SAEs: {shown}",
                "give one of them as filepath",
                status=422,
            )
        found = below[places[0]] if places else found
    if not has_weights(found):
        raise config_not_found(f"{repo_id} has no SAE at {filepath}")
    names = {file.name for file in found}
    for weights, beside in BARE.items():
        if weights in names and not names & {"cfg.json", beside}:
            raise config_not_found(f"{repo_id} has {weights} without cfg.json at {filepath}")
    return sorted(found, key=lambda file: (not file.name.endswith(".json"), file.path)), is_directory


def list_folder(api: Any, repo_id: str, folder: str, commit: str, *, recursive: bool) -> list[Listed]:
    """The files of a folder. Names come from strangers: those that would lead out are left out."""
    found = []
    for entry in api.list_repo_tree(repo_id, folder or None, revision=commit, recursive=recursive):
        if not hasattr(entry, "size"):
            continue
        with contextlib.suppress(ServiceError):
            found.append(listed(entry)._replace(path=relative_name(entry.path)))
    return found


def parent_of(path: str) -> str:
    parent = str(PurePosixPath(path).parent)
    return "" if parent == "." else parent


def belongs(file: Listed) -> bool:
    """Whether a file is of an SAE: weights that are no model's, or a small JSON."""
    name = file.name.lower()
    if name.startswith((*OTHERS, ".")):
        return False
    return name.endswith(WEIGHTS) or (name.endswith(".json") and file.size <= MAX_JSON_BYTES)


def has_weights(files: list[Listed]) -> bool:
    return any(file.name.lower().endswith(WEIGHTS) for file in files)
