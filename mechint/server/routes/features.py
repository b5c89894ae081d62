"""The features of an SAE: list, search, and everything about one."""

from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request

from mechint.server import features, library
from mechint.server.answers import FeatureDetail, FeatureList
from mechint.server.errors import not_ready
from mechint.server.library import Service
from mechint.server.models import SharedSAE
from mechint.server.routes.shared import SaeIdOf, ServiceOf, errors
from mechint.server.schemas import FeatureSort, Order

router = APIRouter(tags=["features"])


def ready_sae(service: Service, sae_id: str) -> SharedSAE:
    """The row of an SAE whose files are there. Raises `ServiceError`."""
    with service.db.read() as session:
        row = library.get_sae(session, sae_id)
    if row.status != "ready":
        raise not_ready(sae_id, row.status)
    return row


@router.get(
    "/{sae_id}/features", response_model=FeatureList, responses=errors(404, 409), summary="The features of an SAE"
)
def list_features(
    sae_id: SaeIdOf,
    service: ServiceOf,
    request: Request,
    skip: Annotated[int, Query(ge=0, le=10**9)] = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 20,
    search: Annotated[
        str | None,
        Query(max_length=255, pattern=r"^[^\x00]*$", description="A feature's number, or part of a label or token."),
    ] = None,
    sort_by: FeatureSort = FeatureSort.feature_idx,
    order: Order | None = None,
) -> dict[str, Any]:
    """Density and activations come from the run's analysis; community SAEs may bring their density along."""
    found = request.app.state.analyses.get(ready_sae(service, sae_id))
    # numbers from 0 up, figures from the highest down
    descending = sort_by is not FeatureSort.feature_idx if order is None else order is Order.desc
    listed = features.search(found, search, sort_by.value, descending)
    page = listed[skip : skip + limit]
    return {
        "sae_id": sae_id,
        "n_features": found.n_features,
        "features": [features.summary(found, feature) for feature in page],
        "pagination": {
            "skip": skip,
            "limit": limit,
            "total": len(listed),
            "has_more": skip + len(page) < len(listed),
        },
        "analysed": found.analysed,
        "note": " ".join(found.notes) or None,
    }


@router.get(
    "/{sae_id}/features/{feature_idx}",
    response_model=FeatureDetail,
    responses=errors(404, 409),
    summary="One feature: contexts, effects on the output, relatives",
)
def get_feature(
    sae_id: SaeIdOf,
    feature_idx: Annotated[int, Path(ge=0, le=10**9)],
    service: ServiceOf,
    request: Request,
) -> dict[str, Any]:
    return features.detail(request.app.state.analyses.get(ready_sae(service, sae_id)), feature_idx)
