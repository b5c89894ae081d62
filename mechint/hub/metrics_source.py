"""What runs were and what came out of them: from Weights & Biases, or from a JSON file that holds the same.

A record is a run's id, its config, its summary and when it began. `candidates` reads from it, by the names that saev
logs them under,

    eval/l0, eval/normalized_mse       L0 and NMSE (eval/mse is a mean over random prefixes and ranks runs differently)
    objective.n_prefixes               there and a number: the Matryoshka objective
    sae.activation.key                 relu, top-k or batch-top-k
    val_data.layer                     the layer
"""

import base64
import contextlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mechint.errors import MechintError, nearest, one_line
from mechint.hub.frontier import Candidate
from mechint.provenance import write_json

L0, NMSE = "eval/l0", "eval/normalized_mse"
OBJECTIVES = ("any", "matryoshka", "vanilla")
ACTIVATIONS = ("any", "relu", "top-k", "batch-top-k")
# What the class of an activation is called in a config that has no key.
CLASSES = {"Relu": "relu", "TopK": "top-k", "BatchTopK": "batch-top-k"}
# Ids that W&B is asked for at once.
BATCH = 100
TIMEOUT_SECONDS = 60


@dataclass(frozen=True)
class Record:
    """One run as its tracker knows it."""

    run_id: str
    config: Mapping[str, Any] = field(default_factory=dict)
    summary: Mapping[str, Any] = field(default_factory=dict)
    created_at: str = ""


@dataclass(frozen=True)
class Gathered:
    """Runs that can be chosen from, and those that cannot.

    Attributes:
        candidates: what was measured and asked for.
        skipped: run id -> why it could not be used: not found, a metric or the layer missing or no number.
        filtered: run id -> why it was not asked for: another objective, activation or layer.
    """

    candidates: list[Candidate]
    skipped: dict[str, str]
    filtered: dict[str, str]


def candidates(
    run_ids: Sequence[str],
    records: Mapping[str, Record],
    *,
    objective: str = "any",
    activation: str = "any",
    layers: Sequence[int] = (),
) -> Gathered:
    """The runs of `run_ids` that were measured, of one objective and activation type, and of `layers` if any are given.

    Raises:
        MechintError: an unknown objective or activation.
    """
    for name, value, known in (("objective", objective, OBJECTIVES), ("activation", activation, ACTIVATIONS)):
        if value not in known:
            raise MechintError(f"{name} {value!r} is unknown; {nearest(value, known)}")
    found = Gathered([], {}, {})
    for run_id in dict.fromkeys(run_ids):
        if (record := records.get(run_id)) is None:
            found.skipped[run_id] = "no such run in the source of metrics"
        elif reason := _unwanted(record, objective, activation):
            found.filtered[run_id] = reason
        elif isinstance(candidate := _measured(record), str):
            found.skipped[run_id] = candidate
        elif layers and candidate.layer not in layers:
            found.filtered[run_id] = f"layer {candidate.layer}"
        else:
            found.candidates.append(candidate)
    return found


def _unwanted(record: Record, objective: str, activation: str) -> str | None:
    """Why a run is of another kind than asked for; None if it is not."""
    is_matryoshka = _whole(_at(record.config, "objective", "n_prefixes")) is not None
    kind = activation_key(record.config)
    if objective != "any" and is_matryoshka != (objective == "matryoshka"):
        return "Matryoshka objective" if is_matryoshka else "vanilla objective (no n_prefixes)"
    if activation not in ("any", kind):
        return f"activation {kind}"
    return None


def activation_key(config: Mapping[str, Any]) -> str | None:
    """relu, top-k or batch-top-k, from a run's config; None where it does not say."""
    setting = _at(config, "sae", "activation")
    for place in (setting, _at(setting, "params")):
        for name in ("key", "kind"):
            if isinstance(key := _at(place, name), str):
                return key
    return CLASSES.get(str(_at(setting, "cls")))


def _measured(record: Record) -> Candidate | str:
    """The candidate that a record describes, or what it lacks."""
    values = {}
    for name in (L0, NMSE):
        value = record.summary.get(name, _at(record.summary, *name.split("/")))
        if value is None:
            return f"{name} is missing"
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            return f"{name} is {one_line(value, 40)}, not a finite number"
        values[name] = float(value)
    if values[L0] <= 0:
        return f"{L0} is {values[L0]:g}: nothing is ever active"
    if values[NMSE] < 0:
        return f"{NMSE} is {values[NMSE]:g}, below 0"
    places = (("val_data", "layer"), ("train_data", "layer"), ("data", "layer"), ("layer",))
    layer = next((found for place in places if (found := _whole(_at(record.config, *place))) is not None), None)
    if layer is None:
        return "its config does not say the layer (val_data.layer)"
    setting = _at(record.config, "sae", "activation")
    shown = setting if isinstance(setting, Mapping) else {}
    return Candidate(record.run_id, layer, values[L0], values[NMSE], record.created_at, shown)


def _at(value: Any, *keys: str) -> Any:
    """`value[key][key]...`; None where there is nothing."""
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


# --- JSON -------------------------------------------------------------------------------------------------------------


def read_records(path: str | Path) -> dict[str, Record]:
    """Records from a file that `write_records` wrote, or from a flat one.

    An object with an entry a run id, a list of entries with `run_id`, or such an entry a line (.jsonl). An entry has
    `config`, `summary` and `created_at`; or, flat, `layer`, `l0`, `nmse` and perhaps `date`, `n_prefixes` and
    `activation` (a key, or the whole setting).

    Raises:
        MechintError: no such file, no JSON, or another shape.
    """
    path = Path(path)
    shape = "an object with an entry for each run id, or a list of entries with run_id (docs/publish.md)"
    try:
        text = path.read_text(encoding="utf-8")
        lines = [line for line in text.splitlines() if line.strip()]
        value: Any = [json.loads(line) for line in lines] if path.suffix == ".jsonl" else json.loads(text)
    except FileNotFoundError:
        raise MechintError(f"metrics file not found: {path}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise MechintError(f"metrics file {path} cannot be read: {one_line(error, 120)}") from None
    entries: list[Any] = (
        [{**entry, "run_id": run_id} if isinstance(entry, dict) else None for run_id, entry in value.items()]
        if isinstance(value, dict)
        else value
    )
    if not isinstance(entries, list) or not all(
        isinstance(entry, dict) and isinstance(entry.get("run_id"), str) for entry in entries
    ):
        raise MechintError(f"metrics file {path} should hold {shape}")
    return {entry["run_id"]: _record(entry, path) for entry in entries}


def _record(entry: dict[str, Any], path: Path) -> Record:
    run_id = entry["run_id"]
    if "config" in entry or "summary" in entry:
        config, summary = entry.get("config", {}), entry.get("summary", {})
        if not isinstance(config, dict) or not isinstance(summary, dict):
            raise MechintError(f"metrics file {path}: config and summary of {run_id} should be objects")
        return Record(run_id, config, summary, str(entry.get("created_at") or ""))
    activation = entry.get("activation")
    config = {
        "val_data": {"layer": entry.get("layer")},
        "objective": {"n_prefixes": entry.get("n_prefixes")},
        "sae": {"activation": {"key": activation} if isinstance(activation, str) else activation},
    }
    return Record(run_id, config, {L0: entry.get("l0"), NMSE: entry.get("nmse")}, str(entry.get("date") or ""))


def write_records(path: str | Path, records: Mapping[str, Record]) -> None:
    """Write records as JSON, of the summaries what is used: the same choice can be made again without a network."""
    kept = {}
    for run_id, record in sorted(records.items()):
        entry = asdict(record)
        del entry["run_id"]
        entry["summary"] = {name: record.summary[name] for name in (L0, NMSE) if name in record.summary}
        kept[run_id] = entry
    write_json(path, kept)


# --- Weights & Biases -------------------------------------------------------------------------------------------------

# (entity/project, ids) -> records of those that are there
Fetch = Callable[[str, Sequence[str]], list[Record]]


def from_wandb(
    run_ids: Sequence[str], project: str, *, fetch: Fetch | None = None, progress: bool = True
) -> dict[str, Record]:
    """The records of runs in a project of Weights & Biases, `entity/project` (or `project` of your default entity).

    The key comes from WANDB_API_KEY, the server from WANDB_BASE_URL if that is set. `fetch` stands in for the API.

    Raises:
        MechintError: no key, the package `wandb` missing, or what the server answered.
    """
    from tqdm import tqdm

    fetch = fetch or _fetch
    run_ids = list(dict.fromkeys(run_ids))
    found: dict[str, Record] = {}
    with tqdm(total=len(run_ids), desc="W&B runs", unit="run", disable=not progress) as bar:
        for start in range(0, len(run_ids), BATCH):
            batch = run_ids[start : start + BATCH]
            found |= {record.run_id: record for record in fetch(project, batch)}
            bar.update(len(batch))
    return found


def _fetch(project: str, run_ids: Sequence[str]) -> list[Record]:
    key = os.environ.get("WANDB_API_KEY", "")
    if not key:
        raise MechintError(
            "WANDB_API_KEY is not set: export the key of https://wandb.ai/authorize, or give --metrics FILE.json"
        )
    with _wandb_environment():
        try:
            import wandb
        except ImportError:
            raise MechintError(
                "package wandb is not installed: pip install wandb, or give --metrics FILE.json"
            ) from None
        try:
            api = wandb.Api(api_key=key, timeout=TIMEOUT_SECONDS)
            runs = api.runs(project, filters={"name": {"$in": list(run_ids)}}, per_page=BATCH, lazy=False)
            return [
                Record(run.id, _plain(run.config), _plain(run.summary_metrics), str(run.created_at or ""))
                for run in runs
            ]
        except MechintError:
            raise
        except Exception as error:  # its classes differ between versions; CommError, ValueError, UsageError ...
            coded = base64.b64encode(f"api:{key}".encode()).decode()  # as it is sent
            words = one_line(str(error).replace(key, "***").replace(coded, "***"), 200)
            raise MechintError(
                f"Weights & Biases did not give the runs of {project!r}: {words}; check --wandb-entity,"
                " --wandb-project and WANDB_API_KEY, or give --metrics FILE.json"
            ) from None


def _plain(value: Any) -> Any:
    """JSON values, of whatever mapping types the client has."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


@contextlib.contextmanager
def _wandb_environment() -> Iterator[None]:
    """Keep the client from making folders for the runs it reads, from chatting, and from reporting to its makers."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        ours = {"WANDB_DIR": scratch, "WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false"}
        before = {name: os.environ.get(name) for name in ours}
        os.environ.update(ours)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value
