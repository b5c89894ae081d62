"""Settings of the commands that read what was trained: evaluate, ablate, compare."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from mechint.config.base import TEXT_FIELD, Backend, Config, ReadsSAE, Unit


@dataclass(frozen=True)
class ReadsTexts(ReadsSAE):
    """How the texts of `--eval-texts-path` are read."""

    text_field: str = TEXT_FIELD
    """Of the given texts, as in collect: the field of a record that holds the text, a chat or token ids."""
    unit: Unit | None = None
    """Of the given texts, as in collect: what one text is."""


@dataclass(frozen=True)
class EvalConfig(ReadsTexts):
    """Evaluate an SAE: reconstruction and sparsity on held-out activations, and what splicing it in costs the model."""

    activations_path: str | None = None
    """Activations to evaluate on, split as the config says; those of the config if not given."""
    rows: Literal["heldout", "all"] = "heldout"
    """Rows to measure on: those that the run held out, or all (for activations that the SAE was not trained on)."""
    output: Path | None = None
    """JSON file to write the results to; eval.json in --run-dir if not given."""
    overwrite: bool = False
    """Replace the output if it exists."""
    eval_texts_path: Path | None = None
    """Texts for the cross-entropy, of any file or folder that collect reads; the activations' held-out ones if not
    given."""
    max_eval_texts: int = 200
    """Most texts for the cross-entropy, from the first on; 0 leaves it out."""
    backend: Backend = "auto"
    """How to run the model, as in collect."""
    batch_size: int = 16
    """Texts through the model at once."""
    resamples: int = 1000
    """Resamples of texts for the 95 % intervals; 0 leaves them out."""
    seed: int = 0
    """Seed of the resamples."""

    def asks_for_more_texts_than(self, n_texts: int) -> bool:
        """Whether a number of texts was named (the default is a limit, not a wish) and there are fewer."""
        return self.max_eval_texts not in (0, EvalConfig.max_eval_texts) and n_texts < self.max_eval_texts


@dataclass(frozen=True, kw_only=True)
class AblateConfig(ReadsTexts):
    """Rank latents by what removing each one does to the model's predictions (KL of clean to ablated)."""

    eval_texts_path: Path
    """Texts: any file or folder that collect reads."""
    output: Path
    """CSV to write, sorted by mean_kl."""
    feature_subset: str | None = None
    """Latents to ablate, such as 1,2,3 or 0-99,512; all if not given."""
    prepend_bos: bool | None = None
    """As in collect; the SAE's own setting if not given."""
    context_size: int | None = None
    """Most tokens read at once, BOS included; longer texts become windows. The model's own limit if not given."""
    batch_size: int = 128
    """(latent, text) pairs run at once."""
    overwrite: bool = False
    """Replace --output if it exists."""


@dataclass(frozen=True)
class CompareConfig(Config):
    """Match the latents of checkpoints by the cosine of their decoder directions; what splits, and what they share."""

    checkpoints: tuple[Path, ...]
    """Two or more checkpoints, such as growing expansions or several seeds; each is compared with all others."""
    output: Path
    """CSV of each latent's nearest in the next checkpoint; X.latents.csv and X.pairs.csv are written beside X.csv."""
    overwrite: bool = False
    """Replace --output if it exists."""
    activation_dim: Annotated[int | None, arg(aliases=["--d-in"])] = None
    """Width that the checkpoints must have; only checked."""
    threshold: float = 0.7
    """Cosine from which two latents count as the same, and a latent as the child of another."""
    block_size: int = 1024
    """Latents compared at once; bounds the memory."""


@dataclass(frozen=True)
class RankConfig(ReadsTexts):
    """Rank all latents by an estimate of what removing each does, and measure how far the estimate can be trusted."""

    output: Path | None = None
    """CSV to write, with its .json beside it; ranking.csv in the run directory if not given."""
    eval_texts_path: Path | None = None
    """Texts, any file or folder that collect reads; the run's own held-out texts if not given."""
    activations_path: str | None = None
    """Activations whose stored tokens are the texts, split as the run says; the run's own if not given."""
    num_texts: int | None = None
    """Texts to rank on, from the first on; all if not given."""
    by: Literal["kl", "ce"] = "kl"
    """Rank by the estimated KL, or by the first-order change of the cross-entropy."""
    draws: int = 4
    """Backward passes for the KL estimate; more make it steadier."""
    top: int = 100
    """First latents of the ranking to ablate exactly; all if there are fewer."""
    control: int = 100
    """Latents to ablate exactly that are drawn at random from the others."""
    latents: str | None = None
    """Latents to ablate exactly in any case, such as 1,2,3 or 0-99,512."""
    exact_texts: int = 20
    """Texts to ablate on, drawn at random from those ranked on; all if there are fewer."""
    seed: int = 0
    """Of the draws, the control and the choice of texts."""
    batch_size: int = 128
    """(latent, text) pairs ablated at once."""
    overwrite: bool = False
    """Replace --output if it exists."""
