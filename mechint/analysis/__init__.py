"""What latents do and how they relate: one pass over stored activations, contexts, effects on the output, search, and
decoder directions.

Everything streams: memory is bounded by a batch or a block, not by the number of rows or pairs. docs/analysis.md
states the definitions.
"""

from mechint.analysis.cofiring import Partners
from mechint.analysis.context import (
    Context,
    context_values,
    contexts,
    highlight_html,
    highlight_text,
    latent_values,
)
from mechint.analysis.decoder import (
    decoder_cosine_similarity,
    decoder_similarity_blocks,
    top_decoder_pairs,
)
from mechint.analysis.geometry import Neighbours, decoder_clusters, decoder_map, nearest_latents
from mechint.analysis.latents import GatherSettings, Latents, gather, load_latents, load_or_gather, save_latents
from mechint.analysis.logits import LogitEffects, logit_effects
from mechint.analysis.search import (
    Firing,
    TokenHit,
    feature_consistency_score,
    fires_on,
    latents_on_token,
    search_token,
    token_consistency,
    token_ids,
)
from mechint.analysis.tables import bin_edges
from mechint.analysis.top import collect_top_activations
from mechint.models.pieces import token_strings, token_texts

__all__ = [
    "Context",
    "Firing",
    "GatherSettings",
    "Latents",
    "LogitEffects",
    "Neighbours",
    "Partners",
    "TokenHit",
    "bin_edges",
    "collect_top_activations",
    "context_values",
    "contexts",
    "decoder_clusters",
    "decoder_cosine_similarity",
    "decoder_map",
    "decoder_similarity_blocks",
    "feature_consistency_score",
    "fires_on",
    "gather",
    "highlight_html",
    "highlight_text",
    "latent_values",
    "latents_on_token",
    "load_latents",
    "load_or_gather",
    "logit_effects",
    "nearest_latents",
    "save_latents",
    "search_token",
    "token_consistency",
    "token_ids",
    "token_strings",
    "token_texts",
    "top_decoder_pairs",
]
