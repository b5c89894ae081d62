"""From files in a staging folder to an SAE of the library: read, check, convert with a certificate, publish.

<data>/saes/<id>/original/   the files as they came
<data>/saes/<id>/sae/        the same SAE in mechint's form, with certificate.json; in SAELens's where mechint holds
                             no such SAE (a transcoder, normalised inputs)
"""

import json
import math
import re
from pathlib import Path
from typing import Any

from mechint.errors import DISK_FULL_ERRNOS, MechintError, one_line
from mechint.server import storage
from mechint.server.errors import ServiceError, config_not_found
from mechint.server.jobs import Running, end
from mechint.server.model_table import check_dimension, common_name, hint
from mechint.server.models import utc_now
from mechint.server.storage import size_of

# The API's names of formats; every other format is `custom`, and named in sae_metadata.original_format.
API_FORMATS = {
    "saelens": "community_standard",
    "saelens_pre6": "community_standard",
    "gemma_scope": "gemma_scope",
    "mistudio": "mistudio",
}
DOWNLOADED, CONVERTED = 90.0, 99.0
# Hooks as wide as the residual stream; others have widths of their own.
_RESIDUAL_WIDTH = re.compile(r"resid|mlp_out|attn_out|hook_out|^$")
MAX_TEXT, MAX_DEPTH = 2000, 20


def ingest(running: Running, staged: Path, *, source: dict[str, Any], more: dict[str, Any]) -> None:
    """Make `staged/original` the SAE of the job.

    Args:
        source: where the files came from; goes into the certificate.
        more: what is known beside the files, for sae_metadata.

    Raises:
        ServiceError: Config file not found, Dimension mismatch, or what is wrong with the files.
    """
    running.report("convert", DOWNLOADED, "Converting", always=True)
    original, new = staged / "original", staged / "sae"
    said = running.params.get("model_name")
    found = read(original, said, running.params.get("format"))
    sae = found.pop("sae")
    running.check()
    converted = convert(sae, new, found["sae_metadata"]["original_format"], source)
    running.report("convert", CONVERTED, "Checking and filing", always=True)
    size = size_of(original)
    folder = staged.parent / f"{staged.name}.whole"
    folder.mkdir()
    original.rename(folder / "original")
    new.rename(folder / "sae")
    storage.flush(folder)
    with running.held() as (session, job, sae):
        if sae is None or sae.status == "deleted":
            running.cancel.set()
        running.check()
        assert sae is not None
        metadata = {**sae.sae_metadata, **found.pop("sae_metadata"), **more, "conversion": converted}
        for name, value in found.items():
            # what the request said of the SAE stays; the files fill in the rest
            if value is not None and (getattr(sae, name) is None or name in ("format", "hook_type", "hook_name")):
                setattr(sae, name, value)
        sae.sae_metadata, sae.file_size_bytes = plain(metadata), size
        sae.local_path = f"saes/{sae.id}"
        sae.status, sae.progress, sae.error_message = "ready", 100.0, None
        sae.downloaded_at = utc_now()
        end(session, job, "done", stage="complete", progress=100.0, message="Ready", result={"sae_id": sae.id})
        session.flush()
        storage.publish(running.settings, folder, sae.id)


def read(original: Path, model_name: str | None, api_format: str | None = None) -> dict[str, Any]:
    """What the files say, under the names of `models.SAE`, with the SAE itself under `sae`."""
    from mechint.formats.convert import load, unknown_in_words
    from mechint.formats.limits import layer_of

    path = only_file(original) or original
    try:
        form, sae = load(path)
    except MechintError as error:
        words = without_path(str(error), original)
        if words == without_path(unknown_in_words(path), original):
            raise config_not_found(words) from None
        raise ServiceError("not_an_sae", f"The files cannot be read: {words}", status=422) from None
    shown = API_FORMATS.get(form.name, "custom")
    if api_format not in (None, "custom", shown):
        raise config_not_found(f"the files are {form.title}, not {api_format}")
    hook = str(sae.metadata.get("hook_name") or "")
    if _RESIDUAL_WIDTH.search(hook):
        check_dimension(model_name, sae.d_in)
    named = sae.metadata.get("model_name")
    return {
        "sae": sae,
        "d_model": sae.d_in,
        "n_features": sae.d_sae,
        "architecture": str(sae.cfg.architecture),
        "layer": layer_of(sae.metadata),
        "hook_name": hook[:255] or None,
        "hook_type": hook_type(hook),
        "model_name": common_name(str(named))[:255] if named else None,
        "format": shown,
        "sae_metadata": {
            "original_format": form.name,
            "file_metadata": dict(sae.metadata),
            "options": {**sae.saved_options(), **sae.departing()},
            "notes": [without_path(note, original) for note in sae.notes],
            "model_hint": hint(sae.d_in)._asdict(),
        },
    }


def convert(sae: Any, output: Path, original_format: str, source: dict[str, Any]) -> dict[str, Any]:
    """Write mechint's form, or SAELens's where mechint has none for it; returns what the certificate says."""
    from mechint.formats.convert import find_format, held_variant, write_proved

    target, why = find_format("mechint", to=True), None
    try:
        held_variant(sae, target)
    except MechintError as error:
        target, why = find_format("saelens", to=True), str(error)
    extra = {"source": {**source, "format": original_format}}
    try:
        certificate = write_proved(sae, output, target, extra=extra)[0]
    except MechintError as error:
        cause = error.__cause__
        if isinstance(cause, OSError) and cause.errno in DISK_FULL_ERRNOS:
            raise ServiceError("disk_full", "No room to convert the SAE", "make room and retry", status=507) from None
        words = without_path(str(error), output.parent)
        raise ServiceError("conversion_failed", f"Conversion failed: {words}", status=422) from None
    return {
        "format": target.name,
        "folded": list(certificate.folded),
        "encode_difference": certificate.encode_difference,
        "decode_difference": certificate.decode_difference,
        "n_probes": certificate.n_probes,
        "weights_equal": certificate.weights_equal,
        "note": why,
    }


def only_file(folder: Path) -> Path | None:
    """The one file of weights of a folder in which it lies alone: its format may be told by its own name."""
    files = [entry for entry in folder.iterdir() if entry.is_file()]
    return files[0] if len(files) == 1 and not any(entry.is_dir() for entry in folder.iterdir()) else None


def early_check(cfg_file: Path, model_name: str | None) -> None:
    """Dimension mismatch from a cfg.json alone, before gigabytes are downloaded."""
    if not model_name or cfg_file.stat().st_size > 1 << 22:
        return
    try:
        cfg = json.loads(cfg_file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return  # said properly when the files are read
    if not isinstance(cfg, dict):
        return
    nested = cfg.get("metadata")
    names = [place.get("hook_name") for place in (cfg, nested if isinstance(nested, dict) else {})]
    hook = str(next((name for name in names if name), "") or cfg.get("hook_point") or "")
    d_in = cfg.get("d_in")
    if isinstance(d_in, int) and _RESIDUAL_WIDTH.search(hook):
        check_dimension(model_name, d_in)


def hook_type(hook_name: str) -> str | None:
    """The API's word for a hook: residual, mlp or attention; None for others."""
    words = {"resid": "residual", "mlp": "mlp", "attn": "attention", "hook_z": "attention"}
    return next((word for part, word in words.items() if part in hook_name), None)


def without_path(text: str, folder: Path) -> str:
    """`text` without this machine's folders: clients see it."""
    return one_line(text.replace(f"{folder}/", "").replace(str(folder), "the folder"), 500)


def plain(value: Any, depth: int = 0) -> Any:
    """What a stranger's file says, as JSON that every database takes: no NaN, no NUL, nothing endless or bottomless."""
    if depth > MAX_DEPTH:
        return "..."
    if isinstance(value, dict):
        return {_text(key)[:200]: plain(item, depth + 1) for key, item in list(value.items())[:500]}
    if isinstance(value, (list, tuple)):
        return [plain(item, depth + 1) for item in value[:2000]]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, (bool, int, float)):
        return value
    return _text(value)


def _text(value: Any) -> str:
    return str(value)[:MAX_TEXT].replace("\0", "").encode("utf-8", "replace").decode()
