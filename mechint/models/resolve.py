"""From a name to files: built-in, folder, GGUF file, or Hub repository; errors say how to go on without the Hub."""

import contextlib
import functools
import importlib.util
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from mechint.errors import MechintError, nearest, one_line
from mechint.huggingface.files import cached_file

BUILTIN_MODELS = ("builtin/pythia-tiny",)
# Names that people type -> Hub ids. EleutherAI's suite: Biderman et al. 2023, table 1.
_PYTHIA_SIZES = ("14m", "31m", "70m", "160m", "410m", "1b", "1.4b", "2.8b", "6.9b", "12b")
ALIASES = {
    f"pythia-{size}{suffix}": f"EleutherAI/pythia-{size}{suffix}"
    for size in _PYTHIA_SIZES
    for suffix in ("", "-deduped")
} | {"gpt2": "openai-community/gpt2", "gpt2-small": "openai-community/gpt2"}

# The single-file format of llama.cpp, which transformers reads by turning the weights back into plain numbers.
GGUF = ".gguf"

# One request decides whether the Hub can be reached; the library's own retries would take half a minute.
REACH_TIMEOUT_SECONDS = 10


@dataclass(frozen=True)
class RepoState:
    """What one look at the Hub told: the commit of the revision (None if offline), and whether it answered."""

    sha: str | None
    online: bool


def resolve_model(name: str) -> str:
    """The folder, GGUF file or Hub id that `name` stands for.

    Raises:
        MechintError: a path that does not exist or holds no model, or a name that is not built in, an alias, or of the
            form org/name.
    """
    if name in BUILTIN_MODELS:
        from mechint.builtin import PYTHIA_TINY

        return str(PYTHIA_TINY)
    if name.startswith("builtin/"):
        raise MechintError(f"unknown built-in model {name!r}; {nearest(name, BUILTIN_MODELS)}")
    path = Path(name).expanduser()
    if path.is_dir():
        return str(_in_folder(path).resolve())
    if path.is_file():
        if path.suffix.lower() != GGUF:
            raise MechintError(
                f"{name} is a file, and no {GGUF} one: give the folder that a model was saved into, or a {GGUF} file"
            )
        return str(path.resolve())
    if name in ALIASES:
        return ALIASES[name]
    parts = name.split("/")
    if len(parts) != 2 or name.startswith((".", "/", "~")) or not all(parts):
        raise MechintError(
            f"unknown model {name!r}: expected a Hub id such as EleutherAI/pythia-70m, a folder, a {GGUF} file, or"
            f" builtin/pythia-tiny; {nearest(name, [*ALIASES, *BUILTIN_MODELS])}"
        )
    return name


def _in_folder(folder: Path) -> Path:
    """The model in a folder: the folder itself, or the GGUF file in it."""
    if (folder / "config.json").is_file():
        return folder
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() == GGUF)
    if len(found) > 1:
        raise MechintError(
            f"{folder} holds {len(found)} {GGUF} files: give one of them, {', '.join(str(path) for path in found[:4])}"
        )
    if not found:
        raise MechintError(
            f"{folder} is a folder without config.json or a {GGUF} file: not a model saved with save_pretrained"
        )
    return found[0]


def check_repo(repo_id: str, repo_type: Literal["model", "dataset"], revision: str | None = None) -> RepoState:
    """Ask the Hub once for a repository, so that mistakes and a missing network are known within seconds.

    Raises:
        MechintError: no such repository or revision, or no access to it. A Hub that does not answer is not an error
            here: the state says `online=False` and the caller looks into the cache.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    kind = {"model": "model", "dataset": "data set"}[repo_type]
    elsewhere = {
        "model": "give a local folder, or --model builtin/pythia-tiny which needs no network",
        "dataset": "give a local .txt, .jsonl or .parquet file, or --dataset builtin/tales which needs no network",
    }[repo_type]
    try:
        info = HfApi().repo_info(repo_id, repo_type=repo_type, revision=revision, timeout=REACH_TIMEOUT_SECONDS)
    except GatedRepoError:
        raise MechintError(f"{kind} {repo_id} is gated: accept its terms on the Hub and run `hf auth login`") from None
    except RepositoryNotFoundError:
        raise MechintError(
            f"{kind} {repo_id!r} is not on the Hub, or is private (then run `hf auth login`); or {elsewhere}"
        ) from None
    except RevisionNotFoundError:
        raise MechintError(f"{kind} {repo_id} has no revision {revision!r}; leave it out for the newest") from None
    except HFValidationError as error:
        raise MechintError(f"{repo_id!r} is not a valid Hub id: {one_line(error, 120)}; {elsewhere}") from None
    except HfHubHTTPError as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is not None and status < 500:
            raise MechintError(f"the Hub refused {kind} {repo_id}: {one_line(error, 160)}") from error
        return RepoState(sha=None, online=False)
    except Exception:
        # The HTTP library below huggingface_hub has changed between major versions, and with it the exception classes
        # for "no route", "no name" and "timed out". Offline mode is a ConnectionError.
        logging.getLogger(__name__).debug("the Hub does not answer", exc_info=True)
        return RepoState(sha=None, online=False)
    return RepoState(sha=info.sha, online=True)


def hub_unreachable(what: str, flag: str, local: str, builtin: str) -> MechintError:
    """The error for something that is neither cached nor reachable."""
    return MechintError(
        f"{what} is not in the local cache and the Hub cannot be reached: check the network (and HF_ENDPOINT,"
        f" HF_HUB_OFFLINE), or give {flag} {local}, or {flag} {builtin} which needs no network"
    )


def load_pretrained(
    name: str, source: str, *, dtype: torch.dtype, revision: str | None = None, **placing: Any
) -> tuple[Any, Any, str | None]:
    """The causal language model, its tokenizer and its commit, from a folder, a file, the cache or the Hub.

    The commit is None for a folder or file. `placing` goes to `from_pretrained`, such as a device map.

    Raises:
        MechintError: not found, unreachable, not a causal language model, or of an architecture that cannot be read.
    """
    local = Path(source).exists()
    offline, commit = local, None
    if not local:
        state = check_repo(source, "model", revision)
        offline = not state.online
        commit = state.sha or _cached_commit(source, revision)
        if commit is None:
            raise hub_unreachable(f"model {name}", "--model", "PATH/TO/FOLDER", BUILTIN_MODELS[0])
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # "Loading weights" says nothing that our own progress does not
    # Weights and tokenizer from one commit, even if the repository changes meanwhile.
    kwargs: dict[str, Any] = {"local_files_only": offline} | ({} if local else {"revision": commit})
    if local and Path(source).is_file():
        _check_gguf_reader(name)
        source, kwargs["gguf_file"] = str(Path(source).parent), Path(source).name
    try:
        with _quiet(), _possible_token_ids(), _gguf_read_once() if "gguf_file" in kwargs else contextlib.nullcontext():
            tokenizer = AutoTokenizer.from_pretrained(source, **kwargs)
            config = AutoConfig.from_pretrained(source, **kwargs)
            _drop_impossible_padding(config)
            hf_model = AutoModelForCausalLM.from_pretrained(source, config=config, dtype=dtype, **kwargs, **placing)
        hf_model.config.architectures = hf_model.config.architectures or [type(hf_model).__name__]  # no GGUF says it
    except Exception as error:  # what a broken file makes the readers raise has no common class
        what = kwargs.get("gguf_file", source)
        raise MechintError(f"model {name} cannot be loaded from {what}: {one_line(error, 200)}") from error
    return hf_model, tokenizer, commit


def _check_gguf_reader(name: str) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise MechintError(f"model {name} is a {GGUF} file, which the package gguf reads: pip install 'mechint[gguf]'")


@contextlib.contextmanager
def _possible_token_ids():
    """Old GGUF files write 2^32 - 1 for "no padding token"; while the block lasts, transformers' reader of tokenizers
    is not shown ids that no token has."""
    try:
        from transformers.integrations.gguf import reader
    except ImportError:  # a version that reads tokenizers otherwise
        yield
        return
    own = reader.read_gguf_metadata

    def read(*args: Any, **kwargs: Any) -> Any:
        metadata, *rest = own(*args, **kwargs)
        tokens = metadata.get("tokenizer.ggml.tokens", ())
        n_tokens = tokens if isinstance(tokens, int) else len(tokens)
        impossible = [
            key
            for key, value in metadata.items()
            if key.startswith("tokenizer.ggml.") and key.endswith("_token_id") and not 0 <= value < n_tokens
        ]
        return {key: value for key, value in metadata.items() if key not in impossible}, *rest

    reader.read_gguf_metadata = read
    try:
        yield
    finally:
        reader.read_gguf_metadata = own


@contextlib.contextmanager
def _gguf_read_once():
    """transformers reads a GGUF file's header, with all its tokens, three times, and makes llama.cpp's table of names
    once for each module: most of the time that loading takes. While the block lasts, both are made once."""
    import gguf

    names = ("GGUFReader", "get_tensor_name_map")
    own = {name: getattr(gguf, name) for name in names}
    for name in names:
        setattr(gguf, name, functools.cache(own[name]))
    try:
        yield
    finally:
        for name in names:
            setattr(gguf, name, own[name])


def _drop_impossible_padding(config: Any) -> None:
    """As `_possible_token_ids`, for the config: an embedding takes no padding id that is beyond its size."""
    text = config.get_text_config(decoder=True)
    for part in (config, text):
        padding = getattr(part, "pad_token_id", None)
        if padding is not None and not 0 <= padding < text.vocab_size:
            part.pad_token_id = None


def _cached_commit(repo_id: str, revision: str | None) -> str | None:
    """The commit that `revision` stood for when it was last downloaded; None if it never was."""
    found = cached_file(repo_id, "config.json", revision=revision)
    return None if found is None else found.parent.name  # .../snapshots/<commit>/config.json


@contextlib.contextmanager
def _quiet():
    """Keep transformers' notes about defaults out of the output; its errors are raised, not logged."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
