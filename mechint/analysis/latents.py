"""What one pass over stored activations tells of every latent: `gather`, and its files in a run directory.

latents.safetensors  the tables          latents.json  settings, and the hashes that say what they were made from
"""

import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mechint.analysis.cofiring import Partners, RowSample
from mechint.analysis.context import needs_tokens
from mechint.analysis.entries import BATCH_ROWS, active_entries
from mechint.analysis.tables import MAX_ROWS, Tables, bin_edges
from mechint.data.store import Activations, open_activations
from mechint.errors import MechintError, one_line
from mechint.provenance import atomic_path, read_json, sha256_file, write_json
from mechint.runs import Run
from mechint.sae import SAE, load_sae

FORMAT_VERSION = 1
TABLES_FILE, RECORD_FILE = "latents.safetensors", "latents.json"
# Partners are counted from this many common rows on: one or two by chance would give the highest Jaccard indices.
LEAST_BOTH = 5


@dataclass(frozen=True)
class GatherSettings:
    """What is kept of each latent.

    Attributes:
        k: strongest rows.
        n_sample: random rows on which it fires, which the strata are taken from.
        n_strata, n_examples: equal parts of that sample by value, and rows kept of each.
        n_partners: latents that fire together with it.
        seed: of the random rows.
        skip_first: leave out the rows at position 0 of their text. Where BOS rows were stored, their norm is many times
            that of other rows, and they are the strongest row of most latents that fire on them.
    """

    k: int = 20
    n_sample: int = 100
    n_strata: int = 5
    n_examples: int = 4
    n_partners: int = 10
    seed: int = 0
    skip_first: bool = False


@final
@dataclass(frozen=True)
class Latents:
    """Tables with one line a latent, all on the CPU. Rows are those of the activations; -1 where there are fewer.

    "Fires" means: feature_acts above 0. Strata are equal parts of a random sample of the rows on which a latent fires,
    by value and lowest first; with fewer such rows than the sample holds, the sample is all of them.

    Attributes:
        n_rows: rows that were looked at.
        counts: rows on which it fires.
        mean, max: of its values where it fires, 0 if never.
        top_values, top_rows: the strongest, strongest first; equal values by row. -inf where there are fewer.
        stratum_rows, stratum_values: random rows of each stratum, strongest first.
        stratum_edges: lowest value of the sample, the values between strata, and the highest; NaN if it never fires.
        histogram: rows by value, in the bins of `bin_edges()`: four an octave from 2^-12 to 2^12; what lies outside is
            counted in the first and last bin.
        partners: the latents that fire together with it most.
    """

    n_rows: int
    settings: GatherSettings
    counts: Int[Tensor, " d_sae"]
    mean: Float[Tensor, " d_sae"]
    max: Float[Tensor, " d_sae"]
    top_values: Float[Tensor, "d_sae k"]
    top_rows: Int[Tensor, "d_sae k"]
    stratum_rows: Int[Tensor, "d_sae n_strata n_examples"]
    stratum_values: Float[Tensor, "d_sae n_strata n_examples"]
    stratum_edges: Float[Tensor, "d_sae n_strata+1"]
    histogram: Int[Tensor, "d_sae n_bins"]
    partners: Partners
    seconds: float = 0.0

    @property
    def d_sae(self) -> int:
        return len(self.counts)

    @property
    def density(self) -> Float[Tensor, " d_sae"]:
        """Share of rows on which each latent fires."""
        return (self.counts.double() / max(self.n_rows, 1)).float()

    @property
    def l0(self) -> float:
        """Mean number of latents that fire on a row."""
        return float(self.counts.sum()) / max(self.n_rows, 1)

    def dead(self) -> Int[Tensor, " n"]:
        """Latents that fire on no row."""
        return (self.counts == 0).nonzero().flatten()

    def check_latent(self, latent: int) -> int:
        """`latent`, if there is one of that number. Raises `MechintError` otherwise."""
        if not 0 <= latent < self.d_sae:
            raise MechintError(f"latent {latent} is not among the {self.d_sae} of this SAE: 0 to {self.d_sae - 1}")
        return latent

    def rows_shown(self, latent: int) -> list[int]:
        """The rows kept of a latent, strongest and by stratum, each once."""
        self.check_latent(latent)
        rows = torch.cat([self.top_rows[latent], self.stratum_rows[latent].flip(0).flatten()]).tolist()
        return list(dict.fromkeys(row for row in rows if row >= 0))


def gather(
    sae: SAE,
    acts: Float[Tensor, "n d_in"] | Activations,
    settings: GatherSettings | None = None,
    *,
    batch_size: int = BATCH_ROWS,
    progress: bool = False,
) -> Latents:
    """Encode all rows once and keep what `Latents` holds. The result does not depend on `batch_size`.

    Memory is bounded by a batch, by the tables, and by the sample of rows that partners are counted on (100 MB).

    Raises:
        MechintError: settings that make no sense, activations of another width, more than 2^32 - 1 rows, NaN or Inf.
    """
    settings = settings or GatherSettings()
    for name, value in asdict(settings).items():
        if value < (least := 0 if name in ("seed", "skip_first") else 1):
            raise MechintError(f"{name} must be at least {least}, got {value}")
    n_rows = len(acts) if isinstance(acts, Tensor) else acts.n_rows
    first = None
    if settings.skip_first:
        if isinstance(acts, Tensor):
            raise MechintError("skip_first needs stored activations, a tensor has no positions")
        first = (needs_tokens(acts)[2] == 0).numpy()
    if n_rows > MAX_ROWS:
        raise MechintError(f"{n_rows:,} rows are more than one pass can number ({MAX_ROWS:,}): take fewer shards")
    start = time.perf_counter()
    tables = Tables(
        sae.d_sae, n_top=settings.k, n_sample=settings.n_sample, histogram=True, seed=settings.seed
    )  # fmt: skip
    sample = RowSample(sae.d_sae, seed=settings.seed)
    with _bar(n_rows, progress) as bar:
        for entries in active_entries(sae, acts, batch_size=batch_size):
            without = None
            if first is not None:
                without = first[entries.row : entries.row + entries.n_rows].nonzero()[0]
                entries.silence(without)
            tables.add(entries)
            sample.add(entries, without)
            bar.update(entries.n_rows)
    top_values, top_rows = tables.top()
    stratum_rows, stratum_values, edges = _strata(*tables.sample(), settings)
    counts = torch.from_numpy(tables.counts)
    return Latents(
        n_rows=n_rows if first is None else n_rows - int(first.sum()),
        settings=settings,
        counts=counts,
        mean=torch.from_numpy((tables.sums / np.maximum(tables.counts, 1)).astype(np.float32)),
        max=torch.from_numpy(np.maximum(top_values[:, 0], 0)),
        top_values=torch.from_numpy(top_values),
        top_rows=torch.from_numpy(top_rows),
        stratum_rows=torch.from_numpy(stratum_rows),
        stratum_values=torch.from_numpy(stratum_values),
        stratum_edges=torch.from_numpy(edges),
        histogram=torch.from_numpy(tables.histogram),
        partners=sample.partners(settings.n_partners, least=LEAST_BOTH),
        seconds=time.perf_counter() - start,
    )


def _bar(n_rows: int, progress: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=n_rows, desc="latents", unit="row", unit_scale=True, disable=not progress)


def _strata(
    values: np.ndarray, rows: np.ndarray, settings: GatherSettings
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows and values by stratum, and the values between strata, from samples in random order."""
    d_sae, (n_strata, n_examples) = len(rows), (settings.n_strata, settings.n_examples)
    out_rows = np.full((d_sae, n_strata, n_examples), -1, np.int64)
    out_values = np.full((d_sae, n_strata, n_examples), -np.inf, np.float32)
    edges = np.full((d_sae, n_strata + 1), np.nan, np.float32)
    for latent in range(d_sae):
        n = int((rows[latent] >= 0).sum())
        if n == 0:
            continue
        by_value = np.argsort(values[latent, :n], kind="stable")  # places in the random order
        cuts = [n * s // n_strata for s in range(n_strata + 1)]
        ordered = values[latent, by_value]
        edges[latent] = ordered[np.minimum(cuts, n - 1)]
        for s in range(n_strata):
            picked = np.sort(by_value[cuts[s] : cuts[s + 1]])[:n_examples]  # the first in random order
            picked = picked[np.argsort(-values[latent, picked], kind="stable")]
            out_rows[latent, s, : len(picked)] = rows[latent, picked]
            out_values[latent, s, : len(picked)] = values[latent, picked]
    return out_rows, out_values, edges


# --- on disk ----------------------------------------------------------------------------------------------------------

_TENSORS = tuple(
    field.name for field in fields(Latents) if field.name not in ("n_rows", "settings", "partners", "seconds")
)
_PARTNERS = ("latent", "jaccard", "phi", "both")


def save_latents(latents: Latents, folder: Path, key: dict[str, Any]) -> None:
    """Write `latents.safetensors`, then `latents.json`, whole or not at all. `key` says what they were made from."""
    tensors = {name: getattr(latents, name).contiguous() for name in _TENSORS}
    partners = latents.partners
    tensors |= {f"partner_{name}": getattr(partners, name).contiguous() for name in _PARTNERS}
    with atomic_path(folder / TABLES_FILE) as temporary:
        save_file(tensors, temporary)
    record = {
        "format_version": FORMAT_VERSION,
        **key,
        "settings": asdict(latents.settings),
        "n_rows": latents.n_rows,
        "d_sae": latents.d_sae,
        "partner_rows": partners.n_rows,
        "histogram_edges": [float(edge) for edge in bin_edges()],
        "seconds": round(latents.seconds, 3),
        "tables_sha256": sha256_file(folder / TABLES_FILE),
    }
    write_json(folder / RECORD_FILE, record)


def load_latents(folder: str | Path) -> tuple[Latents, dict[str, Any]]:
    """The tables in a folder and their record.

    Raises:
        MechintError: there are none, or they are cut, changed, or of another version.
    """
    folder = Path(folder)
    record = read_json(folder / RECORD_FILE, "record of the latents")
    if record.get("format_version") != FORMAT_VERSION:
        raise MechintError(f"{folder / RECORD_FILE} has format version {record.get('format_version')}: gather again")
    path = folder / TABLES_FILE
    if not path.is_file() or sha256_file(path) != record.get("tables_sha256"):
        raise MechintError(f"{path} is missing or not what {RECORD_FILE} was written for: gather again")
    try:
        tensors = load_file(path)
        partners = {name: tensors[f"partner_{name}"] for name in _PARTNERS}
        latents = Latents(
            n_rows=record["n_rows"],
            settings=GatherSettings(**record["settings"]),
            partners=Partners(**partners, n_rows=record["partner_rows"]),
            seconds=record["seconds"],
            **{name: tensors[name] for name in _TENSORS},
        )
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise MechintError(f"{path} cannot be read ({one_line(error)}): gather again") from error
    return latents, record


def load_or_gather(
    run: Run | str | Path,
    *,
    sae: SAE | None = None,
    activations: Activations | None = None,
    settings: GatherSettings | None = None,
    progress: bool = False,
) -> Latents:
    """The latents of a run over all rows of its activations: from its files, or gathered anew and saved there.

    They are gathered again when the checkpoint, the activations or the settings are not those of the files, or when a
    file is missing, cut or changed. Files that cannot be written (a folder of somebody else) are left out.

    Args:
        sae: the run's, if it is open already.
        activations: in place of those that the run was trained on.

    Raises:
        MechintError: an unfinished run, activations that are missing or do not fit.
    """
    run = run if isinstance(run, Run) else Run(run)
    checkpoint = run.checkpoint_path
    if activations is None:
        activations = open_activations(run.activations_path())
    return kept_or_gathered(
        sae if sae is not None else load_sae(checkpoint),
        activations,
        run.path,
        sha256_file(checkpoint),
        settings=settings,
        progress=progress,
    )


def kept_or_gathered(
    sae: SAE,
    activations: Activations,
    folder: Path,
    weights_sha256: str,
    *,
    settings: GatherSettings | None = None,
    progress: bool = False,
) -> Latents:
    """`load_or_gather` of an SAE whose tables lie in `folder`."""
    settings = settings or GatherSettings()
    key = {"checkpoint_sha256": weights_sha256, "activations_sha256": activations.sha256}
    try:
        latents, record = load_latents(folder)
        if latents.settings == settings and all(record.get(name) == value for name, value in key.items()):
            return latents
    except MechintError:
        pass  # nothing there that could be used: it is made anew
    latents = gather(sae, activations, settings, progress=progress)
    try:
        save_latents(latents, folder, key)
    except MechintError as error:
        import warnings

        warnings.warn(f"{folder}: what was gathered could not be kept there ({one_line(error)})", stacklevel=2)
    return latents
