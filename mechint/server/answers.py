"""What answers hold. With `schemas.py` these make the OpenAPI document."""

from datetime import datetime
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from mechint.server.schemas import Format, Source, Status


class SAEOut(BaseModel):
    model_config = ConfigDict(from_attributes=True, protected_namespaces=())

    id: str = Field(examples=["sae_0123456789ab"])
    name: str
    description: str | None
    source: Source
    status: Status
    hf_repo_id: str | None
    hf_filepath: str | None
    hf_revision: str | None
    training_id: str | None
    model_name: str | None
    model_id: str | None
    layer: int | None
    hook_type: str | None
    n_features: int | None
    d_model: int | None
    architecture: str | None
    format: Format | None
    local_path: str | None = Field(description="Relative to the server's data folder.")
    file_size_bytes: int | None
    progress: float = Field(ge=0, le=100)
    error_message: str | None
    sae_metadata: dict[str, Any]
    created_at: datetime
    updated_at: datetime
    downloaded_at: datetime | None


class Pagination(BaseModel):
    skip: int
    limit: int
    total: int
    has_more: bool


class SAEList(BaseModel):
    data: list[SAEOut]
    pagination: Pagination


class HubFileOut(BaseModel):
    filepath: str
    size_bytes: int
    is_sae: bool


class PreviewOut(BaseModel):
    model_config = ConfigDict(
        protected_namespaces=(),
        json_schema_extra={
            "examples": [
                {
                    "repo_id": "jbloom/GPT2-Small-SAEs",
                    "repo_type": "model",
                    "description": "SAEs trained on GPT-2 Small",
                    "files": [{"filepath": "layer_0/cfg.json", "size_bytes": 731, "is_sae": True}],
                    "sae_files": [{"filepath": "layer_0/cfg.json", "size_bytes": 731, "is_sae": True}],
                    "sae_paths": ["layer_0", "layer_6"],
                    "model_name": "gpt2",
                    "total_size_bytes": 123456789,
                }
            ]
        },
    )

    repo_id: str
    repo_type: str
    description: str | None
    files: list[HubFileOut]
    sae_files: list[HubFileOut]
    sae_paths: list[str]
    model_name: str | None
    total_size_bytes: int


class UploadOut(BaseModel):
    """The upload is a job: `commit_hash` is null until it is done (GET /api/v1/saes/jobs/{job_id})."""

    sae_id: str
    repo_id: str
    filepath: str
    url: str
    commit_hash: str | None
    job_id: str
    status: str


class AvailableSAE(BaseModel):
    layer: int | None
    hook_type: str | None
    path: str
    size_bytes: int


class ImportedSAE(BaseModel):
    layer: int | None
    hook_type: str | None
    sae_id: str
    sae_name: str
    imported_at: datetime


class AvailableOut(BaseModel):
    training_id: str
    available_saes: list[AvailableSAE]
    imported_saes: list[ImportedSAE]
    total_count: int


class ImportedOut(BaseModel):
    imported_count: int
    sae_ids: list[str]
    saes: list[SAEOut]
    training_id: str
    message: str


class MessageOut(BaseModel):
    message: str


class DeletedOut(BaseModel):
    deleted_count: int
    failed_count: int
    deleted_ids: list[str]
    failed_ids: list[str]
    errors: dict[str, str]
    message: str


class JobOut(BaseModel):
    """Work on an SAE. Its token, if it has one, is not part of it."""

    model_config = ConfigDict(from_attributes=True)

    id: str
    kind: str
    sae_id: str
    state: str = Field(examples=["running"], description="queued, running, done, error or cancelled.")
    stage: str = Field(examples=["download"], description="queued, download, convert, upload or complete.")
    progress: float
    bytes_done: int
    bytes_total: int | None
    message: str
    error: str | None
    error_code: str | None
    attempts: int
    result: dict[str, Any] | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    updated_at: datetime


class ModelHintOut(BaseModel):
    model_config = ConfigDict(protected_namespaces=())

    d_model: int
    model_name: str | None
    candidates: list[str]
    ambiguous: bool
    note: str


class FeatureOut(BaseModel):
    feature_idx: int
    layer: int | None
    label: str | None
    activation_count: int | None
    mean_activation: float | None
    max_activation: float | None
    top_tokens: list[str]
    neuronpedia_url: str | None
    feature_id: str
    density: float | None = Field(description="Share of tokens on which it fires.")


class FeatureList(BaseModel):
    sae_id: str
    n_features: int
    features: list[FeatureOut]
    pagination: Pagination
    analysed: bool = Field(description="Whether figures are there; else `note` says how to make them.")
    note: str | None


class TokenEffect(BaseModel):
    token: str
    effect: float


class NearFeature(BaseModel):
    feature_idx: int
    cosine: float


class ContextOut(BaseModel):
    """A stretch of text on which the feature fires; `values[i]` is what it is on `tokens[i]`."""

    tokens: list[str]
    values: list[float]
    center: int
    activation: float
    text_id: int
    position: int


class FeatureDetail(FeatureOut):
    contexts: list[ContextOut]
    promoted: list[TokenEffect]
    suppressed: list[TokenEffect]
    histogram: list[int]
    histogram_edges: list[float]
    decoder_norm: float
    nearest: list[NearFeature] = Field(description="Features with the most similar decoder direction.")
    notes: list[str]


class ComparePair(BaseModel):
    left_feature: int
    right_feature: int
    cosine: float
    mutual_nearest: bool


class CompareOut(BaseModel):
    left: str
    right: str
    n_left: int
    n_right: int
    d_model: int
    threshold: float
    share_mutual: float
    mean_cosine: float
    median_cosine: float
    chance_cosine: float = Field(description="Median for random directions: what no relation looks like.")
    share_found: float = Field(description="Of left latents, with a right one at or above the threshold.")
    share_found_back: float
    histogram: list[int] = Field(description="Left latents by best cosine: below 0.1, 0.1 to 0.2, ..., 0.9 to 1.")
    highest: list[ComparePair]
    lowest: list[ComparePair]


class SessionOut(BaseModel):
    authenticated: bool
    api_key_needed: bool
    csrf_token: str | None = Field(description="For the header X-CSRF-Token of a browser's state-changing requests.")
    version: str


class ErrorOut(BaseModel):
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "detail": "Repository not found: jbloom/GPT2-Small-SAEs",
                    "code": "repository_not_found",
                    "remedy": "check repo_id, provide access_token",
                }
            ]
        }
    )

    detail: str
    code: str
    remedy: str
    retry_after: int | None = Field(None, description="Seconds, where waiting helps; also in the header Retry-After.")


class FieldProblem(BaseModel):
    loc: list[str | int]
    msg: str
    type: str


class InvalidOut(BaseModel):
    """Fields of a request that are wrong (what was sent is not repeated), or a file that is (`detail` is text)."""

    detail: list[FieldProblem] | str
    code: str
    remedy: str = ""
