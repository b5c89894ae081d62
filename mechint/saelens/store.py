"""`ActivationsStore` as SAELens has it: tokens of a text source in windows of one length, and their activations.

Texts are laid end to end and cut into windows of `context_size` tokens. With `prepend_bos` each window begins with BOS
(unless the text's next token is BOS anyway), and between two texts of a window stands `sequence_separator_token`. With
`disable_concat_sequences` a window is the beginning of one text, and texts that are shorter are left out.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechint.data.text import open_texts
from mechint.data.tokens import read_texts
from mechint.errors import MechintError
from mechint.inside import centres, check_identity, read_hook, special_tokens
from mechint.models import LanguageModel
from mechint.sae.base import as_sae, usable
from mechint.saelens.hooked import HookedSAETransformer
from mechint.saelens.windows import mixed, token_windows

# Texts are read from a source this many at a time.
READ = 64
TOKEN_COLUMNS = ("tokens", "input_ids")
TEXT_COLUMNS = ("text", "problem")


@final
class ActivationsStore:
    """Tokens and activations of a text source for one hook of a model. Make one with `from_sae`.

    Attributes:
        context_size: tokens a window.
        n_dataset_processed: texts read so far, over all epochs.
    """

    def __init__(
        self,
        model: Any,
        dataset: Any,
        *,
        hook_name: str,
        d_in: int,
        context_size: int,
        prepend_bos: bool = True,
        store_batch_size_prompts: int = 8,
        train_batch_size_tokens: int = 4096,
        n_batches_in_buffer: int = 8,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        disable_concat_sequences: bool = False,
        sequence_separator_token: int | str | None = "bos",
        exclude_special_tokens: bool | list[int] = False,
        hook_head_index: int | None = None,
        seqpos_slice: Sequence[int | None] = (None,),
        centre: bool = False,
        seed: int = 42,
    ):
        self.language_model = language_model_of(model)
        self.model, self.dataset = model, dataset
        self.hook_name, self.d_in, self.context_size = hook_name, d_in, context_size
        self.prepend_bos = prepend_bos
        self.store_batch_size_prompts = store_batch_size_prompts
        self.train_batch_size_tokens = train_batch_size_tokens
        self.n_batches_in_buffer = n_batches_in_buffer
        self.device, self.dtype = torch.device(usable(device)), dtype
        self.disable_concat_sequences = disable_concat_sequences
        self.sequence_separator_token = sequence_separator_token
        for name in ("store_batch_size_prompts", "train_batch_size_tokens", "n_batches_in_buffer"):
            if getattr(self, name) < 1:
                raise MechintError(f"{name} must be at least 1, got {getattr(self, name)}")
        limit = self.language_model.n_ctx
        if not 2 <= context_size <= limit:
            raise MechintError(
                f"context_size must be from 2 to {limit} for {self.language_model.name}, got {context_size}"
            )
        self.language_model.check_hook(hook_name)
        self.hook_head_index, self._centre = hook_head_index, centre
        self.seqpos_slice = tuple(seqpos_slice)
        # tokens of a window whose activations are given
        self.training_context_size = len(range(context_size)[slice(*self.seqpos_slice)])
        if not self.training_context_size:
            raise MechintError(f"seqpos_slice {self.seqpos_slice} leaves none of {context_size} tokens")
        self._separator = self._token(sequence_separator_token)
        special = exclude_special_tokens
        if isinstance(special, bool):
            special = sorted(special_tokens(self.language_model.tokenizer)) if special else []
        self._excluded = torch.tensor(special, dtype=torch.long)
        self.n_dataset_processed = 0
        self._generator = torch.Generator().manual_seed(seed)
        self._open = _opener(dataset)
        self._windows = self._all_windows()
        self._batches: Iterator[Tensor] | None = None

    @classmethod
    def from_sae(
        cls,
        model: Any,
        sae: Any,
        dataset: Any = None,
        dataset_trust_remote_code: bool = False,
        context_size: int | None = None,
        streaming: bool = True,
        store_batch_size_prompts: int = 8,
        n_batches_in_buffer: int = 8,
        train_batch_size_tokens: int = 4096,
        total_tokens: int = 10**9,
        device: str | torch.device = "cpu",
        disable_concat_sequences: bool = False,
        sequence_separator_token: int | str | None = "bos",
        exclude_special_tokens: bool | list[int] = False,
        seed: int = 42,
    ) -> "ActivationsStore":
        """A store with the hook, the context, the positions and the BOS policy that an SAE was trained with.

        Activations are those that the SAE was trained on: of a model loaded raw, the mean is taken off for an SAE of
        the centred residual stream.

        Args:
            model: a `HookedSAETransformer` or a model of `mechint.models`.
            dataset: `builtin/tales`, a local file, a data set's id on the Hub, a loaded data set, or any list of texts
                or of rows with a column `text`, `problem`, `tokens` or `input_ids`. The SAE's own if not given.
            context_size: the SAE's if not given.
            exclude_special_tokens: leave the rows of special tokens (those of the tokenizer, or these ids) out of
                `next_batch`.
            streaming, total_tokens: accepted; sources are always read as a stream, without an end of our own.

        Raises:
            MechintError: neither the call nor the SAE says something that is needed; code of a data set would have to
                be run; a model that the SAE does not fit.
        """
        if dataset_trust_remote_code:
            raise MechintError("dataset_trust_remote_code: code of data sets is never run here; give a plain data set")
        sae = as_sae(sae)
        said = sae.cfg.metadata
        dataset = dataset if dataset is not None else said.get("dataset_path") or said.get("dataset_name")
        context_size = int(context_size or said.get("context_size") or 0)
        hook_name = read_hook(sae)
        check_identity(said, language_model_of(model))
        for name, value in {"dataset": dataset, "context_size": context_size}.items():
            if not value:
                raise MechintError(f"the SAE does not say its {name}: pass {name}=...")
        return cls(
            model,
            dataset,
            hook_name=hook_name,
            d_in=sae.cfg.d_in,
            context_size=context_size,
            prepend_bos=bool(said.get("prepend_bos", True)),
            store_batch_size_prompts=store_batch_size_prompts,
            train_batch_size_tokens=train_batch_size_tokens,
            n_batches_in_buffer=n_batches_in_buffer,
            device=device,
            dtype=sae.dtype,
            disable_concat_sequences=disable_concat_sequences,
            sequence_separator_token=sequence_separator_token,
            exclude_special_tokens=exclude_special_tokens,
            hook_head_index=said.hook_head_index,
            seqpos_slice=said.seqpos_slice or (None,),
            centre=centres(sae, hook_name, language_model_of(model)),
            seed=seed,
        )

    def get_batch_tokens(
        self, batch_size: int | None = None, raise_at_epoch_end: bool = False, move_to_model_device: bool = True
    ) -> Int[Tensor, "batch context"]:
        """The next windows' token ids. (Documents name the result `activations`: it is tokens, as in SAELens.)

        At the end of the source it begins again, or raises StopIteration once if asked to.

        Raises:
            MechintError: the source does not fill a single window.
        """
        rows: list[list[int]] = []
        empty = False
        while len(rows) < (batch_size or self.store_batch_size_prompts):
            row = next(self._windows, None)
            if row is not None:
                rows.append(row)
                empty = False
                continue
            self._windows = self._all_windows()
            if raise_at_epoch_end:
                raise StopIteration(f"the texts ended after {self.n_dataset_processed}; they begin again")
            if empty:
                raise MechintError(
                    f"{self.dataset!r} does not fill one window of {self.context_size} tokens: give more text, or a"
                    " smaller context_size"
                )
            empty = True
        tokens = torch.tensor(rows)
        return tokens.to(self.language_model.device) if move_to_model_device else tokens

    @torch.no_grad()
    def get_activations(self, batch_tokens: Int[Tensor, "batch context"]) -> Float[Tensor, "batch pos d_in"]:
        """What the hook holds for these tokens, at the positions of `seqpos_slice`; heads, where there are any, side by
        side, or the one of `hook_head_index`."""
        values = self.language_model.activations(batch_tokens, self.hook_name)[:, slice(*self.seqpos_slice)]
        if self.hook_head_index is not None:
            shape = self.language_model.hook_shape(self.hook_name)
            if len(shape) != 2 or not 0 <= self.hook_head_index < shape[0]:
                raise MechintError(
                    f"{self.hook_name} has no head {self.hook_head_index}: it holds {list(shape)} for a token"
                )
            values = values.unflatten(-1, shape)[:, :, self.hook_head_index]
        if self._centre:
            values = values - values.mean(dim=-1, keepdim=True)
        if values.shape[-1] != self.d_in:
            raise MechintError(
                f"{self.hook_name} of {self.language_model.name} is {values.shape[-1]} wide, but the SAE has d_in"
                f" {self.d_in}"
            )
        values = values.to(self.device, self.dtype)
        return values.clone() if values.is_inference() else values  # gradients of an SAE may be taken with them

    def next_batch(self) -> Float[Tensor, "batch d_in"]:
        """`train_batch_size_tokens` rows, drawn from a shuffled buffer that is filled as it empties."""
        if self._batches is None:
            size = self.n_batches_in_buffer * self.training_context_size * self.store_batch_size_prompts
            self._batches = mixed(self._rows(), size, self.train_batch_size_tokens, self._generator)
        return next(self._batches)

    def __iter__(self) -> Iterator[Float[Tensor, "batch d_in"]]:
        return self

    def __next__(self) -> Float[Tensor, "batch d_in"]:
        return self.next_batch()

    def reset_input_dataset(self) -> None:
        """Begin with the first text again."""
        self._windows, self._batches = self._all_windows(), None

    def _rows(self) -> Iterator[Tensor]:
        """Rows of one batch of windows after another, without end."""
        while True:
            tokens = self.get_batch_tokens()
            rows = self.get_activations(tokens).flatten(0, 1)
            if len(self._excluded):
                kept = ~torch.isin(tokens[:, slice(*self.seqpos_slice)].flatten().cpu(), self._excluded)
                rows = rows[kept.to(rows.device)]
            yield rows

    def _all_windows(self) -> Iterator[list[int]]:
        """The windows of one epoch."""
        ready, sequences = self._open(self)
        if ready:
            for row in sequences:
                if len(row) < self.context_size:
                    raise MechintError(
                        f"{self.dataset!r} holds rows of {len(row)} tokens, fewer than context_size {self.context_size}"
                    )
                yield row[: self.context_size]
            return
        bos = self.language_model.bos_token_id if self.prepend_bos else None
        yield from token_windows(
            sequences,
            self.context_size,
            bos=bos,
            separator=self._separator,
            concat=not self.disable_concat_sequences,
        )

    def _token(self, name: int | str | None) -> int | None:
        if name is None or isinstance(name, int):
            return name
        tokenizer = self.language_model.tokenizer
        found = {"bos": self.language_model.bos_token_id, "eos": tokenizer.eos_token_id, "sep": tokenizer.sep_token_id}
        if name not in found:
            raise MechintError(f"sequence_separator_token {name!r} should be a token id, 'bos', 'eos', 'sep' or None")
        if found[name] is None:
            raise MechintError(f"the tokenizer of {self.language_model.name} has no {name} token: give an id, or None")
        return found[name]

    def _counted(self, token_lists: list[list[int]]) -> Iterator[list[int]]:
        for row in token_lists:
            self.n_dataset_processed += 1
            if row:
                yield list(row)


Opened = tuple[bool, Iterator[list[int]]]


def _opener(dataset: Any) -> Callable[[ActivationsStore], Opened]:
    """What begins an epoch: whether rows are tokens already, and the rows."""
    if isinstance(dataset, (str, Path)):
        open_texts(str(dataset)).close()  # a source that is not there is an error at once
        return lambda store: (False, _from_source(store, str(dataset)))
    if isinstance(dataset, (list, tuple)) and not dataset:
        raise MechintError("dataset holds no text")

    def begin(store: ActivationsStore) -> Opened:
        first = next(iter(dataset), None)
        if isinstance(first, str):
            return False, _from_rows(store, dataset, None)
        columns = list(first) if isinstance(first, dict) else []
        for name in TOKEN_COLUMNS:
            if name in columns:
                return True, _ready_rows(store, dataset, name)
        for name in TEXT_COLUMNS:
            if name in columns:
                return False, _from_rows(store, dataset, name)
        what = f"columns {', '.join(map(str, columns))}" if columns else type(first).__name__
        raise MechintError(
            f"dataset should hold texts, or rows with {', '.join(TEXT_COLUMNS + TOKEN_COLUMNS)}; found {what}"
        )

    return begin


def _from_source(store: ActivationsStore, dataset: str) -> Iterator[list[int]]:
    source = open_texts(dataset)
    start = 0
    try:
        while documents := source.read(start, READ):
            read = read_texts(store.language_model, documents, prepend_bos=store.prepend_bos)
            yield from store._counted(read.token_lists)
            start += len(documents)
    finally:
        source.close()


def _from_rows(store: ActivationsStore, rows: Iterable[Any], column: str | None) -> Iterator[list[int]]:
    texts: list[str] = []
    for row in rows:
        texts.append(row if column is None else row[column])
        if len(texts) == READ:
            yield from store._counted(store.language_model.token_lists(texts))
            texts = []
    if texts:
        yield from store._counted(store.language_model.token_lists(texts))


def _ready_rows(store: ActivationsStore, rows: Iterable[Any], column: str) -> Iterator[list[int]]:
    for row in rows:
        store.n_dataset_processed += 1
        yield [int(token) for token in row[column]]


def language_model_of(model: Any) -> LanguageModel:
    """The `LanguageModel` behind what is given. Raises `MechintError` for other kinds of models."""
    if isinstance(model, HookedSAETransformer):
        return model.language_model
    if isinstance(model, LanguageModel):
        return model
    raise MechintError(
        f"expected a HookedSAETransformer or a model of mechint.models.load_model, got {type(model).__name__}"
    )
