"""Where decoder directions lie: nearest neighbours, clusters, and a map in two dimensions.

scikit-learn is imported where it is used. Everything random is seeded.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechint.errors import MechintError
from mechint.sae import SAE

# [rows, d_sae] block of cosines made at once: 64 MB in float32.
MAX_BLOCK_ELEMENTS = 2**24
# t-SNE sees this many principal components: distances of the rest are mostly noise, and its time grows with them.
N_COMPONENTS = 32
# Steps of t-SNE; its own default of 1000 takes three times as long and moves few points visibly.
TSNE_STEPS = 350


class Neighbours(NamedTuple):
    """For each latent the others whose decoder directions are nearest, nearest first."""

    latent: Int[Tensor, "d_sae k"]
    cosine: Float[Tensor, "d_sae k"]


def _unit_rows(sae: SAE) -> Float[Tensor, "d_sae d_in"]:
    return torch.nn.functional.normalize(sae.W_dec.detach().float().cpu(), dim=1)


def nearest_latents(sae: SAE, k: int = 10) -> Neighbours:
    """The `k` highest cosines of each decoder row with the others, in blocks; all others if there are fewer.

    Raises:
        MechintError: k below 1.
    """
    if k < 1:
        raise MechintError(f"k must be at least 1, got {k}")
    unit = _unit_rows(sae)
    k = min(k, sae.d_sae - 1)
    latent = torch.zeros(sae.d_sae, k, dtype=torch.int64)
    cosine = torch.zeros(sae.d_sae, k)
    size = max(1, MAX_BLOCK_ELEMENTS // sae.d_sae)
    for first in range(0, sae.d_sae, size):
        block = unit[first : first + size] @ unit.T
        own = torch.arange(len(block))
        block[own, own + first] = -torch.inf
        best = block.topk(k, dim=1)
        latent[first : first + size], cosine[first : first + size] = best.indices, best.values.clamp(-1.0, 1.0)
    return Neighbours(latent, cosine)


def decoder_clusters(sae: SAE, n_clusters: int = 24, *, seed: int = 0) -> Int[Tensor, " d_sae"]:
    """A cluster number for each latent: k-means (Lloyd, k-means++ start) on decoder rows of unit norm.

    Between unit rows squared distance is 2 - 2 cosine, so near means similar in direction. Numbers go by size, 0 being
    the largest cluster. Fewer clusters than asked where there are fewer latents.

    Raises:
        MechintError: n_clusters below 1.
    """
    if n_clusters < 1:
        raise MechintError(f"n_clusters must be at least 1, got {n_clusters}")
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):  # sums in one order: the same result on any number of cores
        options: dict[str, Any] = {"n_init": 1, "max_iter": 50, "random_state": seed}
        means = KMeans(min(n_clusters, sae.d_sae), **options)
        found = means.fit_predict(_unit_rows(sae).numpy())
    sizes = np.bincount(found)
    rank = np.empty(len(sizes), np.int64)
    rank[np.argsort(-sizes, kind="stable")] = np.arange(len(sizes))
    return torch.from_numpy(rank[found])


def decoder_map(sae: SAE, *, seed: int = 0, method: str = "tsne") -> Float[Tensor, "d_sae 2"]:
    """A point in the plane for each latent, so that latents of similar directions lie close.

    "pca": the first two principal components of the unit decoder rows. "tsne": the first 32 components, then t-SNE from
    that start (van der Maaten 2014, Barnes-Hut). Only small distances on a t-SNE map mean anything; sizes of clusters
    and gaps between them do not. Coordinates are centred, and scaled so that the largest absolute one is 1.

    Raises:
        MechintError: an unknown method, or fewer than three latents.
    """
    if method not in ("tsne", "pca"):
        raise MechintError(f"unknown method {method!r}: use tsne or pca")
    if sae.d_sae < 3:
        raise MechintError(f"a map needs at least 3 latents, this SAE has {sae.d_sae}")
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    unit = _unit_rows(sae).numpy()
    n = min(N_COMPONENTS, *unit.shape)
    with threadpool_limits(1):  # as for clusters; more threads also wait for each other more than they work
        points = unit if n < 2 else PCA(n, svd_solver="randomized", random_state=seed).fit_transform(unit)
        if n < 2:
            points = np.concatenate([unit, np.zeros_like(unit)], axis=1)
        if method == "tsne":
            perplexity = min(30.0, (sae.d_sae - 1) / 3)
            start = points[:, :2] / max(float(points[:, 0].std()), 1e-12) * 1e-4
            options: dict[str, Any] = {"init": start, "max_iter": TSNE_STEPS, "angle": 0.7, "random_state": seed}
            points = TSNE(perplexity=perplexity, n_jobs=1, **options).fit_transform(points)
    points = torch.from_numpy(np.ascontiguousarray(points[:, :2], dtype=np.float32))
    points = points - points.mean(dim=0)
    return points / points.abs().max().clamp_min(1e-12)
