"""Templates, and how numbers, sizes and states are put in words on the pages."""

import datetime
import functools
import importlib.util
import inspect
import json
from collections.abc import Callable
from typing import Any
from urllib.parse import quote, urlencode

from fastapi import Request
from fastapi.responses import HTMLResponse
from jinja2 import Environment, PackageLoader, StrictUndefined

from mechint import __version__
from mechint.errors import MechintError, one_line
from mechint.server.errors import ServiceError
from mechint.server.features import NEURONPEDIA
from mechint.server.jobs import DOWNLOADS, status_of
from mechint.server.models import Job, SharedSAE
from mechint.server.security import Keys, session_cookie

# Pages load nothing of another site, and nothing inline: text of a stranger's file can neither run nor style them.
POLICY = "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'self'; object-src 'none'"
SOURCES = {"huggingface": "Hub", "trained": "Training run", "local": "File"}
KINDS = {
    "download": "Download",
    "upload": "Upload",
    "publish": "Publication",
    "import_training": "Import from a run",
    "import_file": "Import from a file",
}
N_SHADES = 9  # of a token's background; panel.css has .a1 to .a9


def size(n_bytes: int | None) -> str:
    """`12.3 MB`: decimal, as the Hub counts. The blank keeps the two together on a line."""
    if n_bytes is None:
        return "size unknown"
    number, unit = float(n_bytes), "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if number < 999.5:
            break
        number, unit = number / 1000, larger
    return f"{number:.{0 if unit == 'bytes' or number >= 99.95 else 1}f}\u00a0{unit}"


def count(n: int, noun: str) -> str:
    """`1 SAE`, `2,304 features`."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def significant(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}g}"


def percent(share: float | None) -> str:
    """Three digits, as few firing features live far below a percent."""
    return "" if share is None else f"{100 * share:.3g}%"


def when(time: datetime.datetime | None) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC") if time is not None else ""


def pretty(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True, default=str)


def shade(value: float, top: float) -> int:
    """Which of the `N_SHADES` backgrounds a token gets; 0 for none."""
    return 0 if value <= 0 or top <= 0 else max(1, min(N_SHADES, round(N_SHADES * value / top)))


def place(sae: SharedSAE) -> str:
    """`gpt2, layer 6, residual`: what it reads, as far as that is known."""
    layer = f"layer {sae.layer}" if sae.layer is not None else None
    return ", ".join(part for part in (sae.model_name, layer, sae.hook_type) if part)


def progress_text(job: Job) -> str:
    """As panel.js writes it when an event comes."""
    if not job.bytes_total or job.state == "queued":
        return job.message
    return f"{job.message} \u00b7 {size(job.bytes_done)} of {size(job.bytes_total)}"


def work(sae: SharedSAE, job: Job | None) -> dict[str, Any] | None:
    """What is being done with an SAE: status, progress and text of its row; None if nothing is."""
    if job is not None:
        channel = "download" if job.kind in DOWNLOADS else "upload"
        return {
            "channel": channel,
            "status": status_of(job),
            "progress": round(job.progress, 1),
            "text": progress_text(job),
        }
    if sae.status in ("pending", "downloading", "converting"):
        return {"channel": "download", "status": sae.status, "progress": round(sae.progress, 1), "text": "Queued"}
    return None


def neuronpedia_page(sae: SharedSAE) -> str | None:
    """The SAE's page on Neuronpedia, where its files name one."""
    named = ((sae.sae_metadata or {}).get("file_metadata") or {}).get("neuronpedia_id")
    return f"{NEURONPEDIA}/{quote(named.strip('/'))}" if isinstance(named, str) and "/" in named else None


def with_query(request: Request, **changes: Any) -> str:
    """This page's address with some of its query changed; None takes a part out."""
    kept = {name: value for name, value in request.query_params.items() if value}
    kept |= {name: str(value) for name, value in changes.items()}
    query = urlencode({name: value for name, value in kept.items() if changes.get(name, "") is not None})
    return f"{request.url.path}?{query}" if query else request.url.path


def _environment() -> Environment:
    made = Environment(
        loader=PackageLoader("mechint.server.panel"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"size": size, "num": significant, "percent": percent, "when": when, "pretty": pretty}
    made.globals |= {
        "count": count,
        "shade": shade,
        "place": place,
        "work": work,
        "with_query": with_query,
        "neuronpedia_page": neuronpedia_page,
        "bundles": importlib.util.find_spec("mechint.hub") is not None,
        "SOURCES": SOURCES,
        "KINDS": KINDS,
        "version": __version__,
    }
    return made


_templates = _environment()


def render(request: Request, template: str, /, *, status: int = 200, **context: Any) -> HTMLResponse:
    """A page. What every page has: the session's CSRF token for its script, and whether there is a key to sign out."""
    keys: Keys = request.app.state.keys
    cookie = session_cookie({"cookie": request.headers.get("cookie", "")})
    signed_in = not keys.api_key_needed or keys.is_session(cookie)
    text = _templates.get_template(template).render(
        request=request,
        csrf_token=keys.csrf_token(cookie) if signed_in else "",
        signed_in=signed_in,
        api_key_needed=keys.api_key_needed,
        **context,
    )
    return HTMLResponse(text, status, headers={"Content-Security-Policy": POLICY})


def page(function: Callable[..., HTMLResponse]) -> Callable[..., HTMLResponse]:
    """A route whose failures are pages too, with the name and the remedy of the failure."""

    @functools.wraps(function)
    def shown(*args: Any, **kwargs: Any) -> HTMLResponse:
        try:
            return function(*args, **kwargs)
        except MechintError as error:
            told = error if isinstance(error, ServiceError) else ServiceError("bad_request", one_line(error))
            if told.code == "sae_not_found":  # the page has a link where the API names a request
                told.remedy = "it may have been deleted; the library lists what there is"
            return render(kwargs["request"], "error.html", status=told.status, error=told)

    assert "request" in inspect.signature(function).parameters
    return shown


def number(request: Request, name: str, default: int, *, least: int = 0, most: int = 10**9) -> int:
    """A number of the query; what is none counts as not given."""
    text = request.query_params.get(name, "")
    if not (text.isascii() and text.isdigit() and len(text) < 12):
        return default
    return max(least, min(int(text), most))
