"""One pass over texts that gathers everything: the model once, the SAE once, and the layers behind the hook again.

For each batch the model runs clean, the SAE encodes and decodes what the hook held, and the model goes on from the hook
with the reconstruction there. Where the hook's value is the residual stream, that is the layers behind it only
(`mechint.models.splice`), and predictions under zero or mean ablation depend on the position alone, not on the text:
every edited position holds the same value, and what comes before the first of them is the same in all texts. They are
then computed once for all texts. Both shortcuts are proved on the texts at hand before they are taken; otherwise the
whole model runs once for each of the edits.
"""

import math
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechint.eval.bootstrap import MAX_GROUPS
from mechint.eval.predictions import Compared, Fixed, Head, Unembedding, WholeLogits, compare, fix
from mechint.eval.sums import ReconstructionSums
from mechint.eval.texts import Batch, Text, batches
from mechint.inside import reads_of, written_hook
from mechint.models import Edit
from mechint.models.splice import PROOF_TOKENS, SAME_HIDDEN, Splice, make_splice
from mechint.sae import SAE

BASELINES = ("zero", "mean")
# Largest [tokens, d_vocab] block of logits that is made at once where it must be: 256 MB in float32.
MAX_LOGIT_ELEMENTS = 2**26
# Largest [tokens, d_sae] block of feature_acts: 128 MB in float32.
MAX_FEATURE_ELEMENTS = 2**25


@runtime_checkable
class Predictor(Protocol):
    """The part of `mechint.models.LanguageModel` that is needed here."""

    d_vocab: int
    name: str

    def logits(self, tokens: Tensor) -> Tensor: ...

    def logits_with(self, tokens: Tensor, hook_name: str, edit: Callable[..., Tensor]) -> Tensor: ...


class LanguageSums:
    """Sums over predictions, by text (group) and by whether they are made at a special token."""

    def __init__(self, n_groups: int, n_saes: int, baselines: Sequence[str]):
        self.n_saes, self.baselines = n_saes, list(baselines)
        edits = n_saes + len(self.baselines)
        # [special, group, column]: n, nll_clean, then nll and KL of each edit, the SAEs' first
        self.table = torch.zeros(2, n_groups, 2 + 2 * edits, dtype=torch.float64)

    def add(self, compared: Compared, groups: Int[Tensor, " rows"], special: Bool[Tensor, " rows"]) -> None:
        ones = torch.ones_like(compared.nll_clean)
        rows = torch.stack([ones, compared.nll_clean, *compared.nll, *compared.kl], dim=1)
        for kind, chosen in enumerate((~special, special)):
            self.table[kind].index_add_(0, groups[chosen], rows[chosen])

    def of(self, sae: int, *, special: bool = True) -> Float[Tensor, "group column"]:
        """The sums of one SAE, columns as in `names`; without the predictions made at special tokens if so asked."""
        table = self.table.sum(dim=0) if special else self.table[0]
        edits = self.n_saes + len(self.baselines)
        chosen = [sae, *range(self.n_saes, edits)]
        columns = [0, 1, *(2 + edit for edit in chosen), *(2 + edits + edit for edit in chosen)]
        return table[:, columns]

    def names(self, sae: int) -> list[str]:
        edits = ["sae", *self.baselines]
        return ["n", "nll_clean", *(f"nll_{name}" for name in edits), *(f"kl_{name}" for name in edits)]


class WholeModel:
    """A model that runs from its beginning for every edit: what hooks inside layers, transcoders and TransformerLens
    need."""

    def __init__(self, model: Predictor, hook_name: str, reads: str | None):
        self.model, self.hook_name, self.reads = model, hook_name, reads
        self.head: Head = WholeLogits(model.d_vocab)
        self.width = model.d_vocab  # numbers a token that a pass leaves behind
        self.tokens = torch.zeros(0, 0, dtype=torch.int64)

    def clean(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos width"]:
        self.tokens = tokens
        return self.model.logits(tokens)

    def edited(self, edit: Edit) -> Float[Tensor, "batch pos width"]:
        more = {} if self.reads is None else {"reads": self.reads}  # which a model of one's own need not know
        return self.model.logits_with(self.tokens, self.hook_name, edit, **more)


class FromHook:
    """A model that runs from the hook on for every edit."""

    def __init__(self, splice: Splice):
        self.splice = splice
        self.head: Head = Unembedding(splice.weight, splice.bias)
        self.width = splice.weight.shape[1]
        self.value = torch.zeros(0)

    def clean(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos width"]:
        self.value, final = self.splice.clean(tokens)
        return final

    def edited(self, edit: Edit) -> Float[Tensor, "batch pos width"]:
        return self.splice.rerun(edit(self.value))


def run_texts(
    saes: Sequence[SAE],
    model: Predictor,
    texts: Sequence[Text],
    hook_name: str,
    *,
    mean: Float[Tensor, " d_out"] | None = None,
    rows: ReconstructionSums | None = None,
    special: frozenset[int] = frozenset(),
    norm_limit: float | None = None,
    baselines: Sequence[str] = BASELINES,
    batch_size: int = 16,
    progress: bool = False,
) -> LanguageSums:
    """One pass over `texts`.

    Args:
        hook_name: the hook that the SAEs read. Several SAEs replace one and the same.
        mean: what mean ablation puts in; None leaves that baseline out.
        rows: if given, takes the reconstruction of the first SAE at every position, in four groups for each text:
            4 * group + 2 * (not seen by the SAE) + (special token).
        special: ids of special tokens.
        norm_limit: if given, one more edit, counted as a further SAE: the first SAE, except that activations with a
            larger norm keep the model's value.
        baselines: which of "zero" and "mean" to measure.

    Returns:
        The sums of cross-entropies and KL, in the groups of `text_groups`.
    """
    edits: dict[str, Callable[[Tensor], Tensor]] = {}
    if "zero" in baselines:
        edits["zero"] = torch.zeros_like
    if "mean" in baselines and mean is not None:
        edits["mean"] = lambda value: mean.to(value).expand_as(value)
    hook_out, reads = written_hook(saes[0], hook_name), reads_of(saes[0], hook_name)
    groups, n_groups = text_groups(len(texts))
    replacing = [(sae, rows if index == 0 else None, math.inf) for index, sae in enumerate(saes)]
    if norm_limit is not None:
        replacing.append((saes[0], None, norm_limit))
    sums = LanguageSums(n_groups, len(replacing), list(edits))
    with torch.inference_mode():
        longest = max(texts, key=lambda text: len(text.tokens)).tokens
        splice = make_splice(model, hook_name, longest) if reads is None else "a transcoder replaces another hook"
        forward = WholeModel(model, hook_out, reads) if isinstance(splice, str) else FromHook(splice)
        fixed = None
        if edits and isinstance(forward, FromHook):
            fixed = fixed_baselines(forward, texts, list(edits.values()))
        per_text = list(edits.values()) if fixed is None else []
        widest = max(sae.d_sae for sae in saes)
        max_tokens = min(MAX_LOGIT_ELEMENTS // forward.width, MAX_FEATURE_ELEMENTS // widest)
        for batch in batches(texts, batch_size, max_tokens, progress=progress, what="texts through the model"):
            of_text = groups[batch.numbers]
            is_special = torch.isin(batch.tokens, torch.tensor(sorted(special), dtype=torch.int64))
            # Positions in ascending order, because the fixed predictions are those of a position.
            positions, numbers = batch.predicts.T.nonzero(as_tuple=True)
            targets = batch.tokens[numbers, positions + 1]
            clean = forward.clean(batch.tokens)[numbers, positions]
            edited = []
            kinds = 4 * of_text[:, None] + 2 * ~batch.seen + is_special.long()
            for sae, noted, limit in replacing:
                edit = _Reconstruct(sae, batch, noted, kinds, limit)
                edited.append(forward.edited(edit)[numbers, positions])
            edited += [forward.edited(_only_where(batch.seen, edit))[numbers, positions] for edit in per_text]
            compared = compare(clean, edited, forward.head, targets, fixed=fixed, positions=positions)
            sums.add(compared, of_text[numbers], is_special[numbers, positions])
    return sums


def text_groups(n_texts: int) -> tuple[Int[Tensor, " n_texts"], int]:
    """The group of each text for the bootstrap, and their number: one a text, up to a limit."""
    n_groups = min(n_texts, MAX_GROUPS)
    return torch.arange(n_texts) % n_groups, n_groups


def fixed_baselines(
    forward: FromHook, texts: Sequence[Text], edits: Sequence[Callable[[Tensor], Tensor]]
) -> Fixed | None:
    """The predictions under `edits` at every position, if they are the same in all texts; None if they are not."""
    longest = max(texts, key=lambda text: len(text.tokens))
    length = len(longest.tokens)
    n_kept = longest.seen.index(True) if True in longest.seen else length
    for text in texts:
        kept = min(n_kept, len(text.tokens))
        if text.tokens[:kept] != longest.tokens[:kept] or text.seen != [i >= n_kept for i in range(len(text.tokens))]:
            return None
    if length * forward.splice.weight.shape[0] > MAX_LOGIT_ELEMENTS:
        return None
    forward.clean(torch.tensor([longest.tokens]))
    seen = torch.tensor([longest.seen])
    finals = [forward.edited(_only_where(seen, edit))[0] for edit in edits]
    # The proof: the first positions with other tokens.
    n_other = min(length, n_kept + PROOF_TOKENS)
    other = [*longest.tokens[:n_kept], *reversed(longest.tokens[n_kept:])][:n_other]
    forward.clean(torch.tensor([other]))
    for final, edit in zip(finals, edits, strict=True):
        again = forward.edited(_only_where(seen[:, :n_other], edit))[0]
        if bool(((again - final[:n_other]).norm(dim=-1) > SAME_HIDDEN * final[:n_other].norm(dim=-1)).any()):
            return None
    return fix(finals, forward.head)


class _Reconstruct:
    """The edit that puts in the SAE's reconstruction where the SAE was trained, and notes how good it is."""

    def __init__(
        self,
        sae: SAE,
        batch: Batch,
        rows: ReconstructionSums | None,
        kinds: Int[Tensor, "batch pos"],
        norm_limit: float,
    ):
        self.sae, self.batch, self.rows, self.kinds, self.norm_limit = sae, batch, rows, kinds, norm_limit

    def __call__(
        self, value: Float[Tensor, "batch pos d_out"], read: Float[Tensor, "batch pos d_in"] | None = None
    ) -> Float[Tensor, "batch pos d_out"]:
        used = self.batch.real if self.rows is not None else self.batch.seen
        target = value[used.to(value.device)].float()
        x_hat, feature_acts = self.sae.run(target if read is None else read[used.to(value.device)].float())
        if self.rows is not None:
            self.rows.add(target, x_hat, feature_acts, self.kinds[used], self.batch.seen[used])
        replaced = self.batch.seen[used].to(value.device)
        if self.norm_limit < math.inf:
            x_hat = torch.where(target.norm(dim=1, keepdim=True) > self.norm_limit, target, x_hat)
        edited = value.clone()
        edited[self.batch.seen.to(value.device)] = x_hat[replaced].to(value.dtype)
        return edited


def _only_where(seen: Bool[Tensor, "batch pos"], edit: Callable[[Tensor], Tensor]) -> Edit:
    def masked(value: Float[Tensor, "batch pos d_out"], *read: Tensor) -> Float[Tensor, "batch pos d_out"]:
        return torch.where(seen.to(value.device)[..., None], edit(value).to(value.dtype), value)

    return masked
