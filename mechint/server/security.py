"""Who may ask what: API key, Host names, same origin, CSRF tokens, and no token in any log.

Without an API key the server listens on the loopback address only, and whoever can reach it there is its user. What is
left to keep out then is other people's web pages in that user's browser: a page may send requests to 127.0.0.1, so

- the Host header must be a name of this server (a page of evil.example whose name was pointed at 127.0.0.1 sends its
  own),
- what changes something, and every WebSocket, must come from a page of this server (Origin, Sec-Fetch-Site), and bring
  the token that only such a page can read (X-CSRF-Token; a WebSocket cannot bring it),
- no answer may be read, framed or embedded by another site.

Programs that are no browsers send neither Origin nor cookies and are not asked for the token.
"""

import base64
import hashlib
import hmac
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from mechint.errors import MechintError
from mechint.server.errors import ServiceError, body, forbidden
from mechint.server.settings import LOOPBACK, Settings

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

COOKIE = "mechint_session"
CSRF_HEADER = "x-csrf-token"
SESSION_SECONDS = 12 * 3600
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
WILDCARDS = ("0.0.0.0", "::")
# What anyone may ask for: signing in, and whether the server is alive. Their pages hold nothing of the library.
OPEN_PATHS = ("/api/v1/session", "/healthz", "/login", "/favicon.ico")
OPEN_PREFIXES = ("/static/",)
# Of every answer that does not say otherwise.
HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"same-origin"),
    (b"x-frame-options", b"DENY"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"),
    (b"cache-control", b"no-store"),
)


class Keys:
    """Signs sessions and CSRF tokens, and compares API keys."""

    def __init__(self, settings: Settings, secret: bytes):
        self._api_key = _digest(settings.api_key) if settings.api_key else None
        # another API key ends the sessions that the old one opened
        self._key = hmac.digest(secret, b"mechint web session" + (self._api_key or b""), "sha256")

    @property
    def api_key_needed(self) -> bool:
        return self._api_key is not None

    def is_api_key(self, given: str) -> bool:
        # digests of equal length: the time says nothing of the key, not even how long it is
        return self._api_key is not None and hmac.compare_digest(_digest(given), self._api_key)

    def new_session(self) -> str:
        """A cookie's value."""
        text = f"{int(time.time()) + SESSION_SECONDS}.{secrets.token_urlsafe(16)}"
        return f"{text}.{self._sign('session', text)}"

    def is_session(self, cookie: str) -> bool:
        text, _, signature = cookie.rpartition(".")
        if not text or not hmac.compare_digest(
            self._sign("session", text).encode(), signature.encode("utf-8", "replace")
        ):
            return False
        until = text.partition(".")[0]
        return until.isascii() and until.isdigit() and len(until) < 12 and int(until) > time.time()

    def csrf_token(self, cookie: str) -> str:
        """What the pages of a session send with each change. Without an API key there are no sessions, and one token
        for all pages of this server."""
        return self._sign("csrf", cookie if self.api_key_needed else "")

    def is_csrf_token(self, given: str, cookie: str) -> bool:
        return hmac.compare_digest(given.encode("utf-8", "replace"), self.csrf_token(cookie).encode())

    def _sign(self, what: str, text: str) -> str:
        digest = hmac.digest(self._key, f"{what}:{text}".encode("utf-8", "replace"), "sha256")
        return base64.urlsafe_b64encode(digest).rstrip(b"=").decode("ascii")


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def check_binding(settings: Settings) -> None:
    """Raise `MechintError` for a server that others could reach without a key."""
    if settings.api_key is not None and len(settings.api_key) < 16:
        raise MechintError(
            "the API key has fewer than 16 characters: set MECHINT_API_KEY to a longer one, for example of"
            " `python -c 'import secrets; print(secrets.token_urlsafe(32))'`"
        )
    if settings.host not in LOOPBACK and not settings.api_key:
        raise MechintError(
            f"--host {settings.host} can be reached from other machines: set MECHINT_API_KEY, or listen on 127.0.0.1"
        )


def host_names(settings: Settings) -> frozenset[str] | None:
    """Names that a Host header may have, without the port; None for all.

    A server on all addresses has names that nobody listed: its API key protects it, since a page that took over a name
    has no cookie for it.
    """
    if settings.host in WILDCARDS and not settings.allowed_hosts:
        return None
    own = () if settings.host in WILDCARDS else (settings.host,)
    return frozenset(name.lower().strip("[]") for name in (*LOOPBACK, *own, *settings.allowed_hosts))


class Guard:
    """The ASGI middleware that refuses what the module says, and puts `HEADERS` on every answer."""

    def __init__(self, app: App, *, settings: Settings, keys: Keys):
        self.app, self.keys = app, keys
        self.hosts, self.max_bytes = host_names(settings), settings.max_upload_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        try:
            self.check(scope)
        except ServiceError as error:
            await self.refuse(scope, receive, send, error)
            return

        async def send_with_headers(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = with_headers(message.get("headers", ()))
            await send(message)

        await self.app(scope, receive, send_with_headers if scope["type"] == "http" else send)

    def check(self, scope: Scope) -> None:
        """Raise `ServiceError` unless the request may go on."""
        headers = _headers(scope)
        host = headers.get("host", "")
        if self.hosts is not None and _host_name(host) not in self.hosts:
            raise ServiceError(
                "host_not_allowed",
                "This server does not answer to the name in the Host header",
                "use its address, or start it with the name in MECHINT_ALLOWED_HOSTS",
                status=421,
            )
        length = headers.get("content-length", "0")
        if (
            length.isascii() and length.isdigit() and int(length[:20]) > self.max_bytes
        ):  # the rest is counted as it comes
            raise ServiceError("too_large", f"The request has more than {self.max_bytes} bytes", status=413)
        changes = scope["type"] == "websocket" or scope["method"] not in SAFE_METHODS
        cookie = session_cookie(headers)
        if changes:
            self.check_origin(headers, host)
        path = scope["path"]
        is_open = path in OPEN_PATHS or path.startswith(OPEN_PREFIXES)
        by_key = self.key_given(headers)
        if self.keys.api_key_needed and not is_open and not by_key and not self.keys.is_session(cookie):
            raise ServiceError(
                "api_key_needed", "An API key is needed", "send it as `Authorization: Bearer KEY`", status=401
            )
        from_browser = bool(cookie) or "origin" in headers or "sec-fetch-site" in headers
        if (
            changes
            and scope["type"] == "http"
            and from_browser
            and not by_key
            and path != "/api/v1/session"  # signing in: the page has no token yet, and its own key is what counts
            and not self.keys.is_csrf_token(headers.get(CSRF_HEADER, ""), cookie)
        ):
            raise ServiceError(
                "csrf_token_needed",
                "The CSRF token is missing or of another session",
                "load the page again; GET /api/v1/session has the token for the header X-CSRF-Token",
                status=403,
            )

    def key_given(self, headers: dict[str, str]) -> bool:
        """Whether the request brings the API key itself. A wrong one is no key: it does not fall back to a cookie."""
        kind, _, value = headers.get("authorization", "").partition(" ")
        given = value.strip() if kind.lower() == "bearer" else headers.get("x-api-key", "")
        return bool(given) and self.keys.is_api_key(given)

    def check_origin(self, headers: dict[str, str], host: str) -> None:
        """Raise `ServiceError` for what a page of another site (another port is another site) began."""
        site = headers.get("sec-fetch-site", "same-origin").lower()
        origin = headers.get("origin")
        if site not in ("same-origin", "none") or (origin is not None and not _same_host(origin, host)):
            raise forbidden("The request comes from a page of another site", "use the pages of this server")

    async def refuse(self, scope: Scope, receive: Receive, send: Send, error: ServiceError) -> None:
        if scope["type"] == "websocket":
            await receive()  # websocket.connect
            await send({"type": "websocket.close", "code": 1008, "reason": error.code})  # the handshake answers 403
            return
        from starlette.responses import JSONResponse, RedirectResponse

        if error.status == 401 and scope["method"] == "GET" and "text/html" in _headers(scope).get("accept", ""):
            answer: Any = RedirectResponse("/login", 303)
        else:
            challenge = {"www-authenticate": "Bearer"} if error.status == 401 else {}
            answer = JSONResponse(body(error), error.status, headers=challenge)
        answer.raw_headers = with_headers(answer.raw_headers)
        await answer(scope, receive, send)


def with_headers(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """`headers` and those of `HEADERS` that they do not set themselves."""
    found = list(headers)
    names = {name.lower() for name, _ in found}
    return found + [pair for pair in HEADERS if pair[0] not in names]


def session_cookie(headers: dict[str, str]) -> str:
    """The value of the session's cookie, or ""."""
    for part in headers.get("cookie", "").split(";"):
        name, _, value = part.strip().partition("=")
        if name == COOKIE:
            return value
    return ""


def _headers(scope: Scope) -> dict[str, str]:
    return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}


def _host_name(host: str) -> str:
    """The name of a Host header without its port, in lower case; "" for what is none."""
    try:
        return (urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:
        return ""


def _same_host(origin: str, host: str) -> bool:
    """Whether an origin is this host and port; the scheme may differ behind a proxy that speaks TLS."""
    try:
        parsed = urlsplit(origin)
        own = urlsplit(f"//{host}")
        ports = (parsed.port or _DEFAULT_PORTS[parsed.scheme], own.port or _DEFAULT_PORTS[parsed.scheme])
    except (ValueError, KeyError):  # "null", and what is no origin
        return False
    return bool(parsed.hostname) and parsed.hostname == own.hostname and ports[0] == ports[1]


_DEFAULT_PORTS = {"http": 80, "https": 443}


# --- logs -------------------------------------------------------------------------------------------------------------

_SECRETS = re.compile(
    r"""(?ix)
    (?P<lead> \b(?:access[_-]?token|api[_-]?key|x-api-key|hf[_-]?token|token|password|mechint_session)
              ["']? \s* [=:] \s* ["']?
            | \bbearer\s+ )
    (?P<value> [^\s"'&,;)}\]]+ )
    | \b(?P<hub> (?:hf|api_org)_(?!hub|xet|home|endpoint|token|file|api)[A-Za-z0-9]{4,} )
    """
)


def redact(text: str) -> str:
    """`text` with every token, key and password in it blotted out."""
    return _SECRETS.sub(lambda found: (found["lead"] or "") + "***", text)


def redact_logs() -> None:
    """From now on, nothing that is logged in this process holds a token: also request lines and tracebacks."""
    make = logging.getLogRecordFactory()
    if getattr(make, "redacts", False):
        return

    def factory(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make(*args, **kwargs)
        if isinstance(record.msg, str):
            record.msg = redact(record.msg)
        if isinstance(record.args, tuple):
            record.args = tuple(_redacted(value) for value in record.args)
        elif isinstance(record.args, dict):
            record.args = {name: _redacted(value) for name, value in record.args.items()}
        if record.exc_info and record.exc_info[0] is not None:
            record.exc_text = redact(logging.Formatter().formatException(record.exc_info))
        return record

    factory.redacts = True  # type: ignore[attr-defined]
    logging.setLogRecordFactory(factory)


def _redacted(value: Any) -> Any:
    if isinstance(value, str):
        return redact(value)
    return value if isinstance(value, int | float | None) else _LazyText(value)


class _LazyText:
    """An object in a log line, written out (and redacted) only if the line is."""

    def __init__(self, value: Any):
        self.value = value

    def __str__(self) -> str:
        return redact(str(self.value))

    def __repr__(self) -> str:
        return redact(repr(self.value))
