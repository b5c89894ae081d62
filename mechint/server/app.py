"""`create_app`: the API, its documents and its errors as one ASGI application."""

import contextlib
import functools
import logging
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException
from starlette.middleware.body_limit import RequestBodyLimitMiddleware

from mechint import __version__
from mechint.errors import MechintError, one_line
from mechint.server import library, tokens, ws
from mechint.server.errors import ServiceError, body
from mechint.server.events import Events
from mechint.server.features import Analyses
from mechint.server.panel import pages
from mechint.server.routes import compare, features, hf, imports, jobs, publish, reports, saes, session
from mechint.server.security import Guard, Keys, check_binding, redact_logs
from mechint.server.settings import Settings
from mechint.server.unchanged import Unchanged

PREFIX = "/api/v1"
log = logging.getLogger(__name__)

DESCRIPTION = """\
Sparse autoencoders, shared: downloads from and uploads to the Hugging Face Hub, imports from training runs and files,
their features, and comparisons.

Downloads, imports and uploads are jobs: the answer comes at once, and the work is done by worker processes. Progress
comes over the WebSocket `/ws`: send `{"action": "subscribe", "channel": "sae/ID/download"}` (or `.../upload`) and
receive `{"event": "sae:download", "channel": ..., "data": {"sae_id", "progress", "status", "message", "stage"}}`, the
present state first.

Every error answer is `{"detail", "code", "remedy"}`. Where the server has an API key, send it as
`Authorization: Bearer KEY`.
"""


def create_app(settings: Settings, *, service: library.Service | None = None) -> FastAPI:
    """The application for one server process.

    Args:
        service: the opened database, where the caller has it already; else it is opened (and migrated) at startup.

    Raises:
        MechintError: settings that would let strangers in.
    """
    check_binding(settings)
    redact_logs()
    app = FastAPI(
        title="mechint",
        summary="The sharing service for sparse autoencoders",
        description=DESCRIPTION,
        version=__version__,
        openapi_url=f"{PREFIX}/openapi.json",
        docs_url=None,  # those pages load scripts of other sites
        redoc_url=None,
        lifespan=_lifespan,
    )
    app.state.settings = settings
    app.state.service = service
    app.state.owns_service = service is None
    app.state.keys = Keys(settings, tokens.secret_bytes(settings))
    app.state.analyses = Analyses(settings)
    app.add_exception_handler(ServiceError, _service_error)
    app.add_exception_handler(MechintError, _user_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _bug)
    app.include_router(session.router, prefix=PREFIX)
    # those with fixed paths first: /{sae_id} takes whatever is left
    for part in (hf, imports, jobs, compare, saes, features, publish, reports):
        app.include_router(part.router, prefix=f"{PREFIX}/saes")
    app.add_api_websocket_route("/ws", ws.channel)
    app.add_api_route("/healthz", _alive, include_in_schema=False, methods=["GET"])
    app.openapi = functools.cache(functools.partial(_document, app, settings.api_key is not None))
    pages.mount(app)
    app.add_middleware(RequestBodyLimitMiddleware, max_body_size=settings.max_upload_bytes)
    app.add_middleware(Guard, settings=settings, keys=app.state.keys)
    return app


def _document(app: FastAPI, api_key_needed: bool) -> dict[str, Any]:
    """The OpenAPI document, with the API key where the server has one."""
    found = FastAPI.openapi(app)
    if api_key_needed:
        schemes = {"bearer": {"type": "http", "scheme": "bearer"}}
        schemes["header"] = {"type": "apiKey", "in": "header", "name": "X-API-Key"}
        found["components"]["securitySchemes"] = schemes
        found["security"] = [{"bearer": []}, {"header": []}]
    return found


@contextlib.asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    redact_logs()  # uvicorn has set its own logging up since
    if app.state.service is None:
        app.state.service = library.open_service(app.state.settings)
    app.state.events = Events(app.state.service.db)
    app.state.unchanged = Unchanged(app.state.service.db)
    try:
        yield
    finally:
        await app.state.events.stop()
        app.state.unchanged.close()
        if app.state.owns_service:
            app.state.service.db.close()
            app.state.service = None


async def _alive() -> PlainTextResponse:
    return PlainTextResponse("ok\n")


# --- errors -----------------------------------------------------------------------------------------------------------


async def _service_error(request: Request, error: Any) -> JSONResponse:
    headers = {"Retry-After": str(error.retry_after)} if error.retry_after is not None else None
    return JSONResponse(body(error), error.status, headers=headers)


async def _user_error(request: Request, error: Any) -> JSONResponse:
    return JSONResponse(body(ServiceError("bad_request", one_line(error))), 400)


async def _invalid(request: Request, error: Any) -> JSONResponse:
    """Where and what is wrong, without the values: one of them may be a token."""
    problems = [
        {"loc": [_plain(part) for part in problem["loc"]], "msg": problem["msg"], "type": problem["type"]}
        for problem in error.errors()
    ]
    return JSONResponse({"detail": problems, "code": "invalid_request", "remedy": ""}, 422)


def _plain(part: Any) -> str | int:
    return part if isinstance(part, int) else str(part).encode("utf-8", "replace").decode()[:100]


async def _http_error(request: Request, error: Any) -> JSONResponse:
    codes = {404: "not_found", 405: "method_not_allowed", 413: "too_large", 415: "unsupported_media_type"}
    told = {"detail": str(error.detail), "code": codes.get(error.status_code, "bad_request"), "remedy": ""}
    return JSONResponse(told, error.status_code, headers=error.headers)


async def _bug(request: Request, error: Exception) -> JSONResponse:
    """Our own mistake. The server's log has the traceback; the answer has none of it."""
    told = {"detail": "The server failed", "code": "internal_error", "remedy": "its log says why"}
    return JSONResponse(told, 500)
