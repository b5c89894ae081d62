"""What a repository of the Hub holds, before anything is downloaded: its files, those of SAEs, and their model."""

import re
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from mechint.huggingface.client import hub_api
from mechint.server.errors import from_hub, repository_not_found
from mechint.server.model_table import common_name

README_BYTES = 256 * 1024  # of a README or cfg.json; longer ones are cut, or not read
MAX_DESCRIPTION = 500
MAX_FILES = 50_000
TIMEOUT_SECONDS = 30
_FAR = 999_999

_WEIGHT_SUFFIXES = (".safetensors", ".npz", ".pt", ".pth", ".bin")
_SAE_NAMES = ("sae_weights", "sparsity", "decoder", "encoder")
_SAE_PREFIXES = ("w_", "b_", "sae.", "sae_", "ae.pt", "autoencoder.pt")
_CONFIG_NAMES = ("cfg.json",)
# Folders that people name SAEs by; a .safetensors file below one is taken for an SAE's.
_SAE_FOLDER = re.compile(
    r"layer|width|canonical|(^|[-_.])(res|mlp|attn)([-_.]|$)|resid|hookpoint|(^|[-_.])saes?([-_.]|$)"
)
# Of a repository's name or of its model card, where no configuration says it.
_MODEL_HINTS = (
    ("gemma-scope", "gemma"),
    ("gpt2-medium", "gpt2-medium"),
    ("gpt2-large", "gpt2-large"),
    ("gpt2-xl", "gpt2-xl"),
    ("gpt2", "gpt2"),
    ("gemma", "gemma"),
    ("llama", "llama"),
    ("mistral", "mistral"),
    ("pythia", "pythia"),
)


class HubFile(NamedTuple):
    filepath: str
    size_bytes: int
    is_sae: bool


class HubPreview(NamedTuple):
    repo_id: str
    repo_type: str
    description: str | None
    files: list[HubFile]
    sae_files: list[HubFile]
    sae_paths: list[str]
    model_name: str | None
    total_size_bytes: int


def preview(repo_id: str, *, token: str | bool | None = None, endpoint: str | None = None) -> HubPreview:
    """List a model repository. Nothing is written to this machine's disk, so nothing of a private one stays here.

    `token` is used for this call only. None: the environment's or the Hub login's; False: none at all.

    Raises:
        ServiceError: Repository not found (also for a private one without a token), Rate limit exceeded, the Hub's
            other failures.
    """
    api = hub_api(token, endpoint)
    try:
        info = api.model_info(repo_id, files_metadata=True, timeout=TIMEOUT_SECONDS)
    except Exception as error:  # the HTTP library's classes differ between versions of huggingface_hub
        raise from_hub(error, repo_id, what="reading") from None
    if info.siblings is None:
        raise repository_not_found(repo_id)
    files = sorted(
        (
            HubFile(s.rfilename, int(s.size or 0), is_sae_file(s.rfilename))
            for s in info.siblings[:MAX_FILES]
        ),
        key=lambda file: natural(file.filepath),
    )  # fmt: skip
    paths = sae_paths(files)
    names = {file.filepath for file in files}
    card = info.card_data.to_dict() if info.card_data is not None else {}
    readme = _read(api, repo_id, "README.md", info.sha) if "README.md" in names else None
    return HubPreview(
        repo_id=repo_id,
        repo_type="model",
        description=description(card, readme),
        files=files,
        sae_files=[file for file in files if file.is_sae],
        sae_paths=paths,
        model_name=_model_name(api, repo_id, info.sha, paths, names, card),
        total_size_bytes=sum(file.size_bytes for file in files),
    )


def is_sae_file(filepath: str) -> bool:
    """Whether a file of a repository looks like an SAE's: its weights, its configuration, its sparsity."""
    path = PurePosixPath(filepath.lower())
    name = path.name
    if name in _CONFIG_NAMES or name == "params.npz":
        return True
    if not name.endswith(_WEIGHT_SUFFIXES):
        return False
    if any(part in name for part in _SAE_NAMES) or name.startswith(_SAE_PREFIXES):
        return True
    return name.endswith(".safetensors") and any(_SAE_FOLDER.search(part) for part in path.parts[:-1])


def sae_paths(files: list[HubFile]) -> list[str]:
    """The folders that hold SAE files, by layer, width and L0; `["."]` for files at the top, or where none is found."""
    parents = {str(PurePosixPath(file.filepath).parent) for file in files if file.is_sae}
    return sorted(parents, key=_place) or ["."]


def _place(path: str) -> tuple[Any, ...]:
    def number(pattern: str) -> int:
        found = re.search(pattern, path.lower())
        return int(found[1]) if found and len(found[1]) < 10 else _FAR

    layer = number(r"layer[_\-.]?(\d+)")
    if layer == _FAR:
        layer = number(r"blocks\.(\d+)\.")
    if layer == _FAR:
        layer = number(r"(?:^|[/_\-.])(\d+)(?:[/_\-.]|$)")
    return layer, number(r"width[_\-]?(\d+)k"), number(r"l0[_\-]?(\d+)"), natural(path)


def natural(text: str) -> tuple[tuple[int, int, str], ...]:
    """A sort key in which layer_10 comes after layer_6."""
    parts = re.findall(r"\d+|\D+", text)
    return tuple(
        (0, int(part), "") if part.isascii() and part.isdigit() and len(part) < 10 else (1, 0, part) for part in parts
    )


def description(card: dict[str, Any], readme: str | None) -> str | None:
    """One paragraph: what the card's front matter says, else the README's first prose, else its title."""
    said = card.get("description") or card.get("summary")
    if isinstance(said, str) and said.strip():
        return _cut(said)
    if not readme:
        return None
    text = re.sub(r"\A\ufeff?---\r?\n.*?\r?\n---[ \t]*(\r?\n|\Z)", "", readme, count=1, flags=re.DOTALL)
    text = re.sub(r"```.*?(```|\Z)|<!--.*?(-->|\Z)", "\n", text, flags=re.DOTALL)
    title = None
    for block in re.split(r"\n\s*\n", text):
        lines = []
        for line in (line.strip() for line in block.strip().splitlines()):
            if heading := re.match(r"#+\s*(.+?)\s*#*$", line):
                title = title or heading[1]
            elif (
                line and not line.startswith(("|", "![", "<", "- ", "* ", ">", "[![")) and not set(line) <= set("-=*_ ")
            ):
                lines.append(line)
        if lines:
            return _cut(" ".join(lines))
    return _cut(title) if title else None


def _cut(text: str) -> str:
    plain = re.sub(r"\[([^\]\[]*)\]\([^)\s]*\)", r"\1", " ".join(text.split()))
    plain = re.sub(r"[*`]+", "", plain).strip()
    return plain if len(plain) <= MAX_DESCRIPTION else plain[: MAX_DESCRIPTION - 1].rstrip() + "\u2026"


def _model_name(
    api: Any, repo_id: str, revision: str | None, paths: list[str], names: set[str], card: dict[str, Any]
) -> str | None:
    """What the first SAE's cfg.json says, else the card's base model, else a family that the names suggest."""
    first = "cfg.json" if paths[0] == "." else f"{paths[0]}/cfg.json"
    if first in names and (text := _read(api, repo_id, first, revision)) and (found := _named_in(text)):
        return common_name(found)
    base = card.get("base_model")
    base = base[0] if isinstance(base, list) and base else base
    if isinstance(base, str) and base.strip():
        return base.strip()[:255]
    words = repo_id.lower().replace("_", "-")
    words = words.replace("gpt-2", "gpt2")
    return next((model for part, model in _MODEL_HINTS if part in words), None)


def _named_in(text: str) -> str | None:
    import json

    try:
        cfg = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(cfg, dict):
        return None
    nested = cfg.get("metadata")
    for place in (cfg, nested if isinstance(nested, dict) else {}):
        name = place.get("model_name")
        if isinstance(name, str) and name.strip():
            return name.strip()[:255]
    return None


def _read(api: Any, repo_id: str, file: str, revision: str | None) -> str | None:
    """The beginning of a text file, or None: a preview without it is better than none."""
    from huggingface_hub import get_session, hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    url = hf_hub_url(repo_id, file, revision=revision, endpoint=api.endpoint)
    try:
        with get_session().stream(
            "GET", url, headers=build_hf_headers(token=api.token), follow_redirects=True, timeout=TIMEOUT_SECONDS
        ) as answer:
            if answer.status_code != 200:
                return None
            data = b""
            for chunk in answer.iter_bytes():
                data += chunk
                if len(data) > README_BYTES:
                    break
    except Exception:  # whatever the HTTP library raises: this file is an extra
        return None
    return data[:README_BYTES].decode("utf-8", errors="replace")
