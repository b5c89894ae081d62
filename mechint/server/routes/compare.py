"""Two SAEs beside one another: for each feature of the left one the nearest of the right one."""

import threading
from typing import Any

import torch
from fastapi import APIRouter

from mechint.compare import cosine_by_chance, match_both_ways
from mechint.compare.match import Matches
from mechint.server.answers import CompareOut
from mechint.server.errors import ServiceError
from mechint.server.features import load_library
from mechint.server.routes.features import ready_sae
from mechint.server.routes.shared import ServiceOf, SettingsOf, errors
from mechint.server.schemas import CompareRequest

router = APIRouter(tags=["compare"])

# left x right x d_model: about half a minute on two cores. Larger pairs are a command's business.
MAX_PRODUCTS = 5 * 10**11
_one_at_a_time = threading.Lock()


@router.post(
    "/compare", response_model=CompareOut, responses=errors(404, 409), summary="Compare the features of two SAEs"
)
def compare(asked: CompareRequest, service: ServiceOf, settings: SettingsOf) -> dict[str, Any]:
    """Matches decoder directions by their cosine, both ways."""
    rows = [ready_sae(service, sae_id) for sae_id in (asked.left, asked.right)]
    with _one_at_a_time:
        left, right = (load_library(settings, row).weights()["W_dec"] for row in rows)
        if left.shape[1] != right.shape[1]:
            raise ServiceError(
                "dimension_mismatch",
                f"Dimension mismatch: {asked.left} has d_model {left.shape[1]}, {asked.right} has {right.shape[1]}",
                "compare SAEs of one width",
                status=422,
            )
        if len(left) * len(right) * left.shape[1] > MAX_PRODUCTS:
            raise ServiceError(
                "too_large", "These SAEs are too large to be compared here", "use `mechint compare`", status=422
            )
        there, back = match_both_ways(left, right)
        chance = cosine_by_chance(right)
    by_cosine = torch.argsort(there.cosine, descending=True, stable=True)
    found = there.cosine >= asked.threshold
    return {
        "left": asked.left,
        "right": asked.right,
        "n_left": len(left),
        "n_right": len(right),
        "d_model": left.shape[1],
        "threshold": asked.threshold,
        "share_mutual": float(there.mutual_nearest.double().mean()),
        "mean_cosine": float(there.cosine.double().mean()),
        "median_cosine": float(there.cosine.median()),
        "chance_cosine": chance,
        "share_found": float(found.double().mean()),
        "share_found_back": float((back.cosine >= asked.threshold).double().mean()),
        "histogram": torch.bincount((there.cosine * 10).floor().clamp(0, 9).long(), minlength=10).tolist(),
        "highest": _pairs(there, by_cosine[: asked.limit].tolist()),
        "lowest": _pairs(there, by_cosine.flip(0)[: asked.limit].tolist()),
    }


def _pairs(matches: Matches, listed: list[int]) -> list[dict[str, Any]]:
    return [
        {
            "left_feature": i,
            "right_feature": int(matches.right_feature[i]),
            "cosine": float(matches.cosine[i]),
            "mutual_nearest": bool(matches.mutual_nearest[i]),
        }
        for i in listed
    ]
