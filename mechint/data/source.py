"""Where training takes its rows from: `Stored`, from disk, or `Live`, from the model as they are wanted.

Both give the same batches for the same seed whenever they are asked, and both can say where they are and be put back
there exactly. `docs/store.md` describes them.
"""

import bisect
import contextlib
import itertools
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, final, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechint.config import CollectConfig
from mechint.data.ahead import ahead
from mechint.data.batches import BatchOrder
from mechint.data.collect import block_of, load_hooked, open_source, settings_at, store_fields
from mechint.data.store import Activations
from mechint.data.text import no_texts
from mechint.data.windows import Block, run_block
from mechint.errors import MechintError
from mechint.models.language_model import LanguageModel
from mechint.streams import LIVE, philox

COLUMNS = ("tokens", "text_ids", "positions")


@dataclass(frozen=True)
class Batch:
    """The rows of one step, by hook: row *i* of each is of the same token, at the same place of the same text.

    The columns are None for activations that do not know them.
    """

    activations: dict[str, Float[Tensor, "batch d_in"]]
    tokens: Int[Tensor, " batch"] | None
    text_ids: Int[Tensor, " batch"] | None
    positions: Int[Tensor, " batch"] | None


@runtime_checkable
class Source(Protocol):
    """Rows of one hook or of several, a batch at a time.

    Attributes:
        hook_names: the hooks, in the order asked for.
        d_in: the width at each hook.
        info: what the rows at each hook are: the fields of `store.json`, as far as they are known.
    """

    hook_names: tuple[str, ...]
    d_in: dict[str, int]
    info: dict[str, dict[str, Any]]

    @property
    def position(self) -> dict[str, Any]:
        """A JSON value: where the source is. Its `step` is the number of the batch that comes next."""
        ...

    def seek(self, position: dict[str, Any]) -> None:
        """Go to a `position`; the batches that follow are, bit for bit, those that followed there."""
        ...

    def next_batch(self) -> Batch:
        """The batch of the next step, in float32."""
        ...

    def close(self) -> None: ...


@final
class Stored:
    """Rows of one store, or of several that were collected in one pass, in the order of `batches`."""

    def __init__(
        self,
        stores: Sequence[Activations],
        batches: BatchOrder,
        device: str | torch.device = "cpu",
    ):
        for store in stores[1:]:
            _check_same_rows(stores[0], store)
        names = [store.info.get("hook_name") or str(store.path) for store in stores]
        self._stores = dict(zip(names, stores, strict=True))
        self._batches, self._device, self._step = batches, device, 0
        self.hook_names = tuple(self._stores)
        self.d_in = {name: store.d_in for name, store in self._stores.items()}
        self.info = {name: store.info for name, store in self._stores.items()}

    @property
    def position(self) -> dict[str, Any]:
        return {"step": self._step}

    def seek(self, position: dict[str, Any]) -> None:
        self._step = position["step"]

    def next_batch(self) -> Batch:
        indices = self._batches.indices(self._step)
        self._step += 1
        rows = {name: store.rows(indices).to(self._device) for name, store in self._stores.items()}
        first = self._stores[self.hook_names[0]]
        columns = (getattr(first, name) for name in COLUMNS)
        return Batch(rows, *(None if column is None else column[indices] for column in columns))

    def close(self) -> None:
        pass


def _check_same_rows(one: Activations, other: Activations) -> None:
    """Raise `MechintError` unless row *i* of both is of the same token."""
    for name in COLUMNS:
        first, second = getattr(one, name), getattr(other, name)
        if first is None or second is None or not torch.equal(first, second):
            raise MechintError(
                f"{one.path} and {other.path} do not hold rows of the same tokens ({name} differ): collect both hooks"
                " in one pass, with --hook A B"
            )


@dataclass(frozen=True)
class _Start:
    """A place in the texts: the number of the next one, and what the source needs to go there."""

    text: int = 0
    state: dict[str, Any] | None = None


@dataclass(frozen=True)
class _Chunk:
    """Consecutive blocks of texts, and where they begin. Known without the model."""

    number: int
    start: _Start
    blocks: list[Block]

    @property
    def n_rows(self) -> int:
        return sum(block.n_rows for block in self.blocks)

    @property
    def n_early(self) -> int:
        """Rows that are given in the first of the two periods in which the chunk is held; the rest follows."""
        return (self.n_rows + 1) // 2


@dataclass(frozen=True)
class _Held:
    """A chunk whose rows are on the device."""

    chunk: _Chunk
    rows: dict[str, Tensor]
    columns: dict[str, Tensor]
    norms: Tensor  # of each row, the largest at any hook


@dataclass(frozen=True)
class _Random:
    """The random orders of one pass: each is a function of the seed and of what it is of."""

    seed: int
    number: int

    def _order(self, kind: int, chunk: int, n: int) -> np.ndarray:
        # sorting the raw output gives an order that does not depend on numpy's version
        raw = philox(self.seed, LIVE, kind, chunk, self.number).random_raw(n)
        return np.argsort(raw, kind="stable")

    def halves(self, chunk: _Chunk) -> tuple[np.ndarray, np.ndarray]:
        """The early and the late rows of a chunk."""
        order = self._order(0, chunk.number, chunk.n_rows)
        return order[: chunk.n_early], order[chunk.n_early :]

    def period(self, before: _Chunk | None, current: _Chunk | None) -> np.ndarray:
        """The rows of a period in order; those of `current` are numbered on from those of `before`."""
        late = self.halves(before)[1] if before else np.empty(0, np.int64)
        early = self.halves(current)[0] + (before.n_rows if before else 0) if current else np.empty(0, np.int64)
        rows = np.concatenate([late, early])
        number = current.number if current else before.number + 1 if before else 0
        return rows[self._order(1, number, len(rows))]


@final
class Live:
    """Rows of a model that runs as they are wanted, mixed in a buffer on its device.

    The texts are read again and again; one reading is a pass, and gives each row once. A pass is cut into chunks of at
    least `buffer_rows` / 2 rows: whole blocks of `--checkpoint-every` texts, which are the shards of a store. Two
    chunks are held at a time. In period p of a pass, half of the rows of chunk p, drawn at random, are given in random
    order together with the half of chunk p - 1 that was left. So what is held follows from the period alone, and going
    to a position runs the model over two chunks and not over all that came before.

    Every row has the bits that `collect` would store on the same device. Rows are mixed within the buffer only: a
    source whose texts are sorted by topic gives batches that are, too.
    """

    def __init__(
        self,
        config: CollectConfig,
        *,
        batch_size: int,
        buffer_rows: int = 2**18,
        seed: int = 0,
        first_text: int = 0,
        model: LanguageModel | None = None,
    ):
        """
        Args:
            config: model, hooks and texts as for `collect`; its output is not used.
            batch_size: rows a batch.
            buffer_rows: rows held on the device, in the model's number format; at most two blocks of texts more.
            seed: of the order.
            first_text: number of the text that a pass begins with; those before it are held out.
            model: the one that `config` names, if it is loaded already.

        Raises:
            MechintError: as `collect`, before anything runs; sizes that are too small. `next_batch` raises it for texts
                that give no row, for NaN, and for what cannot be read.
        """
        if batch_size < 1 or buffer_rows < 2:
            raise MechintError(
                f"batches of {batch_size} rows out of a buffer of {buffer_rows}: there must be at least 1 and 2"
            )
        if first_text >= config.num_texts:
            raise MechintError(
                f"the first {first_text} texts are held out, and --num-texts {config.num_texts} leaves none to train on"
            )
        self._batch_size, self._buffer_rows, self._seed = batch_size, buffer_rows, seed
        self._first = _Start(first_text)
        self.norm_limit: float | None = None
        self.left_out: dict[str, int] = {}
        self._config, source = config, open_source(config)
        self._texts = source.fingerprint()
        if source.describe()["text_source"] == "hub":  # the newest commit may be another one tomorrow
            self._config = config.with_overrides(revision=source.describe()["dataset_revision"])
        self.model = model or load_hooked(config)
        self.hook_names = config.hooks
        self.info = {
            hook: store_fields(config, hook, settings_at(config, hook), source, self.model) for hook in config.hooks
        }
        source.close()
        self.d_in = {hook: info["d_in"] for hook, info in self.info.items()}
        self._chunks: Generator[_Chunk] | None = None
        self._step = 0
        self._rows_seen = False
        self._begin(0, self._first, 0)

    @property
    def position(self) -> dict[str, Any]:
        starts = [asdict(held.chunk.start) if held else None for held in (self._before, self._current)]
        return {
            "step": self._step,
            "pass": self._pass,
            "period": self._period,
            "offset": self._offset,
            "chunks": starts,
            "texts": self._texts,
            "norm_limit": self.norm_limit,
            "left_out": dict(self.left_out),
        }

    def seek(self, position: dict[str, Any]) -> None:
        """As `Source.seek`. A `step` alone will do, too: then the texts up to there are tokenised to find the place.

        Raises:
            MechintError: the texts have changed since.
        """
        if position == self.position:
            return
        if position.get("texts", self._texts) != self._texts:
            raise MechintError(
                f"the texts of {self._config.dataset} have changed since this position was noted: bring them back, or"
                " start again"
            )
        if "chunks" not in position:
            position = self._search(position["step"])
        before, current = (None if start is None else _Start(**start) for start in position["chunks"])
        first = position["period"] - (before is not None)
        self.norm_limit = position.get("norm_limit")
        self._begin(position["pass"], before or current or self._first, max(first, 0))
        while self._period < position["period"]:
            self._advance()
        self._step, self._offset = position["step"], position["offset"]
        self.left_out = dict(position.get("left_out", {}))
        self._rows_seen |= self._step > 0

    def next_batch(self) -> Batch:
        device = self.model.device
        rows = {hook: torch.empty(self._batch_size, width, device=device) for hook, width in self.d_in.items()}
        columns = {name: torch.empty(self._batch_size, dtype=torch.int32) for name in COLUMNS}
        filled = 0
        while filled < self._batch_size:
            order = self._order[self._offset : self._offset + self._batch_size - filled]
            if not len(order):
                self._advance()
                continue
            first = 0  # number of the chunk's first row among those held
            for held in (self._before, self._current):
                if held is None:
                    continue
                n_rows = held.chunk.n_rows
                places = torch.from_numpy(np.flatnonzero((order >= first) & (order < first + n_rows)))
                picks = torch.from_numpy(order)[places] - first
                for name, column in columns.items():
                    column[filled + places] = held.columns[name][picks]
                places, picks = places.to(device), picks.to(device)
                for hook, values in rows.items():
                    values[filled + places] = held.rows[hook][picks].float()
                first += n_rows
            filled += len(order)
            self._offset += len(order)
        self._step += 1
        return Batch(rows, **columns)

    def close(self) -> None:
        if self._chunks is not None:
            self._chunks.close()

    @property
    def nbytes(self) -> int:
        """Bytes that the buffer takes: two chunks, each of up to half of it and a block of texts."""
        size = self.model.hf_model.dtype.itemsize
        return 2 * (self._buffer_rows // 2) * sum(self.d_in.values()) * size

    def sample(self, hook: str, n_rows: int) -> Float[Tensor, "n d_in"]:
        """Up to that many of the rows that come next, in float32 on the CPU; they come all the same."""
        while not len(self._order):
            self._advance()
        held = torch.cat([held.rows[hook] for held in (self._before, self._current) if held is not None])
        order = torch.from_numpy(self._order)
        places = torch.linspace(0, len(order) - 1, min(n_rows, len(order))).long()
        return held[order[places].sort().values.to(held.device)].float().cpu()

    def leave_out(self, norm_limit: float) -> None:
        """From here on, no row whose norm is larger at any hook."""
        self.norm_limit = norm_limit
        self._order = self._without_outliers(self._order)

    def _without_outliers(self, order: np.ndarray) -> np.ndarray:
        """The rows of a period that may be given; those that are left out are counted by token."""
        if self.norm_limit is None or not len(order):
            return order
        held = [one for one in (self._before, self._current) if one is not None]
        is_far = (torch.cat([one.norms for one in held]) > self.norm_limit).numpy()[order]
        tokens = torch.cat([one.columns["tokens"] for one in held])
        for token in tokens[torch.from_numpy(order[is_far])].tolist():
            self.left_out[str(token)] = self.left_out.get(str(token), 0) + 1
        return order[~is_far]

    # --- passes, periods and chunks ----------------------------------------------------------------------------------

    def _begin(self, number: int, start: _Start, chunk: int) -> None:
        """Stand before a chunk of a pass, with nothing held."""
        self.close()
        self._chunks = self._read_chunks(start, chunk)
        self._pass, self._period = number, chunk - 1
        self._before: _Held | None = None
        self._current: _Held | None = None
        self._order, self._offset = np.empty(0, np.int64), 0

    def _advance(self) -> None:
        """To the next period, of the next pass if this one is over."""
        assert self._chunks is not None
        chunk = next(self._chunks, None)
        if chunk is None and self._current is None:
            if not self._rows_seen:
                raise no_texts(self._config.dataset)
            self._begin(self._pass + 1, self._first, 0)
            return
        self._before, self._current = self._current, None  # frees the chunk before that one
        self._current = None if chunk is None else self._run(chunk)
        self._period += 1
        random = _Random(self._seed, self._pass)
        order = random.period(*(held.chunk if held else None for held in (self._before, self._current)))
        self._order, self._offset = self._without_outliers(order), 0
        self._rows_seen |= len(self._order) > 0

    def _run(self, chunk: _Chunk) -> _Held:
        """Put a chunk through the model."""
        rows: dict[str, Tensor] = {}
        norms = torch.zeros(chunk.n_rows)
        start = 0
        for block in chunk.blocks:
            found = run_block(self.model, self.hook_names, block, device=self.model.device)
            own = slice(start, start + block.n_rows)
            for hook, values in found.activations.items():
                norms[own] = torch.maximum(norms[own], found.checked_norms(hook).float().cpu())
                if hook not in rows:
                    rows[hook] = values.new_empty(chunk.n_rows, values.shape[1])
                rows[hook][own] = values
            start += block.n_rows
        columns = {name: torch.cat([getattr(block, name) for block in chunk.blocks]) for name in COLUMNS}
        return _Held(chunk, rows, columns, norms)

    def _read_chunks(self, start: _Start, number: int) -> Generator[_Chunk]:
        """The chunks of a pass from `start` on, the first of them being `number`. Texts are read and tokenised on
        another thread."""
        blocks: list[Block] = []
        with contextlib.closing(ahead(self._read_blocks(start))) as ready:
            for block, after in ready:
                blocks.append(block)
                if sum(block.n_rows for block in blocks) >= self._buffer_rows / 2:
                    yield _Chunk(number, start, blocks)
                    blocks, start, number = [], after, number + 1
        if blocks:
            yield _Chunk(number, start, blocks)

    def _read_blocks(self, start: _Start) -> Generator[tuple[Block, _Start]]:
        """Each block of texts and the place behind it."""
        source, config = open_source(self._config, state=start.state), self._config
        if source.fingerprint() != self._texts:
            raise MechintError(f"the texts of {config.dataset} were changed while they are in use: start again")
        try:
            text = start.text
            while text < config.num_texts:
                wanted = min(config.texts_per_shard, config.num_texts - text)
                texts = source.read(text, wanted)
                if not texts:
                    return
                _, block, _ = block_of(config, self.model, texts, text)
                text += len(texts)
                yield block, _Start(text, source.state())
                if len(texts) < wanted:
                    return
        finally:
            source.close()

    def _search(self, step: int) -> dict[str, Any]:
        """The position of a step, without its `texts`. Every pass has the same chunks."""
        row, periods, rows_before = step * self._batch_size, [], 0
        before: _Chunk | None = None
        with contextlib.closing(self._read_chunks(self._first, 0)) as chunks:
            for chunk in itertools.chain(chunks, [None]):
                starts = [asdict(each.start) if each else None for each in (before, chunk)]
                periods.append((rows_before, starts))
                rows_before += (before.n_rows - before.n_early if before else 0) + (chunk.n_early if chunk else 0)
                if row < rows_before:
                    break
                before = chunk
        if not rows_before:
            raise no_texts(self._config.dataset)
        passes = row // rows_before if row >= rows_before else 0
        offset = row - passes * rows_before
        period = bisect.bisect_right([first for first, _ in periods], offset) - 1
        first, starts = periods[period]
        return {"step": step, "pass": passes, "period": period, "offset": offset - first, "chunks": starts}
