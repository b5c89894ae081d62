"""Signing in from a browser, and the token that its pages need."""

from typing import Any

from fastapi import APIRouter, Request, Response

from mechint import __version__
from mechint.server.answers import MessageOut, SessionOut
from mechint.server.errors import ServiceError
from mechint.server.routes.shared import errors
from mechint.server.schemas import SessionRequest
from mechint.server.security import COOKIE, SESSION_SECONDS, Keys, session_cookie

router = APIRouter(prefix="/session", tags=["session"])


def _state(request: Request, cookie: str) -> dict[str, Any]:
    keys: Keys = request.app.state.keys
    authenticated = not keys.api_key_needed or keys.is_session(cookie)
    return {
        "authenticated": authenticated,
        "api_key_needed": keys.api_key_needed,
        "csrf_token": keys.csrf_token(cookie) if authenticated else None,
        "version": __version__,
    }


@router.get("", response_model=SessionOut, summary="Whether this browser is signed in")
async def get_session(request: Request) -> dict[str, Any]:
    return _state(request, session_cookie({"cookie": request.headers.get("cookie", "")}))


@router.post("", response_model=SessionOut, responses=errors(), summary="Sign in with the API key")
async def sign_in(asked: SessionRequest, request: Request, response: Response) -> dict[str, Any]:
    """Sets a cookie that scripts cannot read and other sites do not send."""
    keys: Keys = request.app.state.keys
    if not keys.api_key_needed:
        return _state(request, "")
    if not keys.is_api_key(asked.api_key.get_secret_value()):
        raise ServiceError("api_key_needed", "This is not the server's API key", "MECHINT_API_KEY holds it", status=401)
    cookie = keys.new_session()
    response.set_cookie(
        COOKIE,
        cookie,
        max_age=SESSION_SECONDS,
        httponly=True,
        samesite="strict",
        secure=request.url.scheme == "https",
    )
    return _state(request, cookie)


@router.delete("", response_model=MessageOut, responses=errors(), summary="Sign out")
async def sign_out(response: Response) -> dict[str, str]:
    response.delete_cookie(COOKIE, httponly=True, samesite="strict")
    return {"message": "Signed out"}
