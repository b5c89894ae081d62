"""What removing a latent does to the model's predictions: one text at a time, or every latent ranked."""

from mechint.ablation.command import Ablation, ablate, partial_path
from mechint.ablation.rank import COLUMNS, feature_indices, rank_features_by_ablation, save_ablation_rows
from mechint.ablation.single import build_transformer_model, compute_text_kl, single_feature_ablation_hook
from mechint.sae import load_sae_checkpoint

__all__ = [
    "COLUMNS",
    "Ablation",
    "ablate",
    "build_transformer_model",
    "compute_text_kl",
    "feature_indices",
    "load_sae_checkpoint",
    "partial_path",
    "rank_features_by_ablation",
    "save_ablation_rows",
    "single_feature_ablation_hook",
]
