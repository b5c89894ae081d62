"""What removing a latent does to the model's predictions: one text at a time, exactly ranked, or estimated for all."""

from mechint.ablation.attribution import Attribution, LogitTarget, attribute, attribution_map
from mechint.ablation.causal import RANKING_COLUMNS, rank_latents
from mechint.ablation.command import Ablation, ablate, partial_path
from mechint.ablation.correlation import spearman
from mechint.ablation.rank import COLUMNS, feature_indices, rank_features_by_ablation, save_ablation_rows
from mechint.ablation.rank_command import Ranking, rank_run
from mechint.ablation.single import (
    build_transformer_model,
    compute_text_kl,
    latent_text_kl,
    single_feature_ablation_hook,
)
from mechint.sae import load_sae_checkpoint

__all__ = [
    "COLUMNS",
    "RANKING_COLUMNS",
    "Ablation",
    "Attribution",
    "LogitTarget",
    "Ranking",
    "ablate",
    "attribute",
    "attribution_map",
    "build_transformer_model",
    "compute_text_kl",
    "feature_indices",
    "latent_text_kl",
    "load_sae_checkpoint",
    "partial_path",
    "rank_run",
    "rank_features_by_ablation",
    "rank_latents",
    "save_ablation_rows",
    "single_feature_ablation_hook",
    "spearman",
]
