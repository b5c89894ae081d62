"""Settings of `mechint concepts`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mechint.config.base import ReadsSAE


@dataclass(frozen=True)
class ConceptsConfig(ReadsSAE):
    """Score an SAE's latents against known concepts: those of the built-in tales, or your own labels.

    Writes concepts.csv (a row a concept), latent_concepts.csv (a row a latent) and concepts.json.
    """

    activations_path: Path | None = None
    """Activations whose texts are labelled; those of the run if not given."""
    labels: Path | None = None
    """CSV of labels: text_id,start,end,concept[,parent] or text,start,end,concept[,parent]; else those of the tales."""
    span_tokens: Literal["any", "first", "last"] = "any"
    """Which tokens of a span carry its label: any that it overlaps, or only its first or last."""
    max_texts: int | None = None
    """Most texts of the tales to score, from the first on; all if not given."""
    min_tokens: int = 20
    """Concepts with fewer tokens than this in either half of the texts are left out."""
    baselines: bool = True
    """Also score a random dictionary of the same size and sparsity, and principal components."""
    probes: bool = True
    """Also fit probes on 1 to 20 latents and on the activations themselves."""
    seed: int = 0
    """Of the split of the texts, the samples of the probes and the random dictionary."""
    output_dir: Path | None = None
    """Folder for the three files; the run directory if not given."""
    texts_output: Path | None = None
    """Only write the texts of the activations, with their numbers, to this CSV, to make labels from."""
    overwrite: bool = False
    """Replace the files if they exist."""
