"""SAEs that are on this machine already: of training runs, and in files."""

from typing import Annotated, Any

from fastapi import APIRouter, Path

from mechint.server import library
from mechint.server.answers import AvailableOut, ImportedOut, SAEOut
from mechint.server.errors import ServiceError
from mechint.server.routes.shared import ServiceOf, errors
from mechint.server.schemas import ImportFileRequest, ImportTrainingRequest, plain

router = APIRouter(tags=["imports"])


@router.get(
    "/training/{training_id}/available",
    response_model=AvailableOut,
    responses=errors(404),
    summary="The SAEs of a training run or sweep",
)
def available(
    service: ServiceOf,
    training_id: Annotated[str, Path(max_length=255, description="Name of a run directory or sweep.")],
) -> dict[str, Any]:
    if not training_id.isprintable():
        raise ServiceError("training_not_found", "Training not found", "give the name of a run directory", status=404)
    return library.available_training(service, training_id)


@router.post(
    "/import/training",
    response_model=ImportedOut,
    status_code=202,
    responses=errors(400, 404, 409),
    summary="Import the SAEs of a training run or sweep",
)
def import_training(asked: ImportTrainingRequest, service: ServiceOf) -> dict[str, Any]:
    found = library.create_import_training(service, **plain(asked))
    count = len(found.saes)
    return {
        "imported_count": count,
        "sae_ids": [sae.id for sae in found.saes],
        "saes": [SAEOut.model_validate(sae) for sae in found.saes],
        "training_id": found.training_id,
        "message": f"Importing {count} SAE{'' if count == 1 else 's'} of {found.training_id}",
    }


@router.post(
    "/import/file",
    response_model=SAEOut,
    status_code=202,
    responses=errors(400),
    summary="Import an SAE from a file or folder",
)
def import_file(asked: ImportFileRequest, service: ServiceOf) -> Any:
    """Only from folders that the operator has allowed."""
    sae, _ = library.create_import_file(service, **plain(asked))
    return sae
