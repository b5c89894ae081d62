"""What requests hold, with the limits of each field. With `answers.py` these make the OpenAPI document."""

import re
from enum import StrEnum
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, StringConstraints

MAX_BATCH = 200  # SAEs of one request
_REPO_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?"
REPO_PATTERN = rf"^{_REPO_PART}/{_REPO_PART}$"
# No control characters in what is shown in lists and logs; descriptions may have lines.
_LINE = r"^[^\x00-\x1f\x7f-\x9f\u2028\u2029]*$"
_TEXT = r"^[^\x00-\x08\x0b\x0c\x0e-\x1f\x7f]*$"
SAE_ID_PATTERN = r"^sae_[0-9a-f]{12}$"


class Status(StrEnum):
    """Of an SAE. While it is uploaded it stays ready; `uploading` is a status of the upload's events."""

    pending = "pending"
    downloading = "downloading"
    converting = "converting"
    ready = "ready"
    error = "error"


class Source(StrEnum):
    huggingface = "huggingface"
    local = "local"
    trained = "trained"


class FeatureSort(StrEnum):
    feature_idx = "feature_idx"
    density = "density"
    mean_activation = "mean_activation"
    max_activation = "max_activation"


class Order(StrEnum):
    asc = "asc"
    desc = "desc"


class Format(StrEnum):
    community_standard = "community_standard"
    gemma_scope = "gemma_scope"
    mistudio = "mistudio"
    custom = "custom"


def _relative(path: str) -> str:
    """A path inside a repository, in one spelling."""
    if path.startswith("/") or "\\" in path:
        raise ValueError("should be a path inside the repository, with / between its parts and none at its start")
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise ValueError("should not contain '..'")
    return "/".join(parts) or "."


def _token(secret: SecretStr) -> SecretStr | None:
    """Characters that an HTTP header can carry; the message does not repeat the token. An empty one is none."""
    if not secret.get_secret_value():
        return None
    if not re.fullmatch(r"[\x21-\x7e]+", secret.get_secret_value()):
        raise ValueError("should be a token of the Hub: printable characters without blanks")
    return secret


def _blank_is_none(value: str) -> str | None:
    """What forms send for a field that was left empty."""
    return value.strip() or None


RepoId = Annotated[
    str,
    StringConstraints(pattern=REPO_PATTERN, max_length=500, strip_whitespace=True),
    Field(description="Repository of the Hub, `user/name`.", examples=["jbloom/GPT2-Small-SAEs"]),
]
FilePath = Annotated[
    str,
    StringConstraints(pattern=_LINE, min_length=1, max_length=1000),
    AfterValidator(_relative),
    Field(description="Folder or file of the SAE inside the repository; `.` for its top.", examples=["layer_6"]),
]
Token = Annotated[
    SecretStr,
    Field(
        max_length=500,
        json_schema_extra={"pattern": "^[!-~]*$"},  # checked below, where no message repeats it
        description="Token of the Hub, used for this request only: encrypted while its job is waiting, never logged or"
        " sent back. Without one, the server's own login (if it has one) is used.",
    ),
    AfterValidator(_token),
]
OptionalToken = Token | None
Name = Annotated[str, StringConstraints(pattern=_LINE, min_length=1, max_length=255, strip_whitespace=True)]
OptionalName = Annotated[str, StringConstraints(pattern=_LINE, max_length=255), AfterValidator(_blank_is_none)] | None
Description = Annotated[str, StringConstraints(pattern=_TEXT, max_length=2000)]
Revision = Annotated[
    str,
    StringConstraints(pattern=r"^([A-Za-z0-9](?:[A-Za-z0-9._/-]*[A-Za-z0-9_-])?)?$", max_length=255),
    AfterValidator(_blank_is_none),
]
# An id in a request's body may be of any form, so that an unknown one is told as unknown and not as ill-formed.
AnySaeId = Annotated[str, StringConstraints(pattern=_LINE, min_length=1, max_length=64)]
TrainingId = Annotated[
    str,
    StringConstraints(pattern=_LINE, min_length=1, max_length=255, strip_whitespace=True),
    Field(description="Name of a run directory (or of a sweep) below the server's runs folder."),
]


class _Request(BaseModel):
    model_config = ConfigDict(hide_input_in_errors=True)


def _example(**values: Any) -> ConfigDict:
    return ConfigDict(hide_input_in_errors=True, json_schema_extra={"examples": [values]})


# --- requests ---------------------------------------------------------------------------------------------------------


class PreviewRequest(_Request):
    model_config = _example(repo_id="jbloom/GPT2-Small-SAEs")

    repo_id: RepoId
    access_token: OptionalToken = None


class DownloadRequest(_Request):
    model_config = _example(
        repo_id="jbloom/GPT2-Small-SAEs",
        filepath="layer_6",
        name="GPT2 Layer 6 SAE",
        description="SAE for layer 6 residual stream",
        model_name="gpt2",
    )

    repo_id: RepoId
    filepath: FilePath
    name: OptionalName = None
    description: Description | None = None
    revision: Revision | None = None
    access_token: OptionalToken = None
    model_name: OptionalName = None
    model_id: OptionalName = None


class UploadRequest(_Request):
    model_config = _example(
        sae_id="sae_0123456789ab",
        repo_id="username/my-sae",
        filepath="layer_6",
        create_repo=True,
        private=False,
        commit_message="Initial upload",
    )

    sae_id: AnySaeId
    repo_id: RepoId
    filepath: FilePath
    access_token: OptionalToken = None
    create_repo: bool = False
    private: bool = False
    commit_message: Annotated[
        str, StringConstraints(pattern=_TEXT, min_length=1, max_length=500), Field(examples=["Initial upload"])
    ] = "Upload SAE"


class PublishRequest(_Request):
    """An SAE as a bundle: card, metadata, weights, hashes."""

    model_config = _example(repo_id="username/my-sae", create_repo=True, private=False)

    repo_id: RepoId
    access_token: OptionalToken = None
    create_repo: bool = False
    private: bool = False
    commit_message: Annotated[str, StringConstraints(pattern=_TEXT, min_length=1, max_length=500)] | None = None
    license: OptionalName = Field(None, description="Of the bundle; `research-only` if not given.", examples=["mit"])


class ImportTrainingRequest(_Request):
    model_config = _example(
        training_id="train_abc123", name="My Trained SAE", description="SAE trained on custom dataset"
    )

    training_id: TrainingId
    name: OptionalName = None
    description: Description | None = None
    import_all: bool = Field(
        True, description="All SAEs of the run or sweep; else those that layers and hook_types name."
    )
    layers: list[Annotated[int, Field(ge=0, le=10_000)]] | None = Field(None, max_length=MAX_BATCH)
    hook_types: list[Annotated[str, StringConstraints(pattern=_LINE, max_length=100)]] | None = Field(
        None, max_length=MAX_BATCH, examples=[["residual"]]
    )


def _format(value: Any) -> Any:
    return "community_standard" if value == "saelens" else value


class ImportFileRequest(_Request):
    model_config = _example(
        file_path="/data/saes/my_sae", name="Local SAE", format="saelens", model_name="gpt2", layer=6
    )

    file_path: Annotated[str, StringConstraints(pattern=_LINE, min_length=1, max_length=4000)] = Field(
        description="A file or folder inside one that the operator allowed with --import-root."
    )
    name: Name
    description: Description | None = None
    format: Annotated[Format, BeforeValidator(_format, json_schema_input_type=Format | str)] = Field(
        Format.community_standard,
        description="`saelens` is another name of `community_standard`.",
        validate_default=True,
    )
    model_name: OptionalName = None
    layer: int | None = Field(None, ge=0, le=10_000)


class DeleteRequest(_Request):
    model_config = _example(sae_ids=["sae_0123456789ab"])

    sae_ids: list[AnySaeId] = Field(min_length=1, max_length=MAX_BATCH)


class CompareRequest(_Request):
    model_config = _example(left="sae_0123456789ab", right="sae_ba9876543210", threshold=0.7, limit=20)

    left: AnySaeId
    right: AnySaeId
    threshold: float = Field(0.7, ge=0, le=1, description="Cosine from which two latents count as the same.")
    limit: int = Field(20, ge=0, le=1000, description="Pairs listed, of the highest and of the lowest cosine.")


class RetryRequest(_Request):
    access_token: OptionalToken = None


class SessionRequest(_Request):
    api_key: SecretStr = Field(min_length=1, max_length=500, description="The server's API key.")


def plain(asked: BaseModel) -> dict[str, Any]:
    """The fields of a request as the library takes them, secrets in clear: for immediate use, never for a log."""
    found = {}
    for name in type(asked).model_fields:
        value = getattr(asked, name)
        if isinstance(value, SecretStr):
            value = value.get_secret_value()
        found[name] = value.value if isinstance(value, StrEnum) else value
    return found
