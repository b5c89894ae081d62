"""`extract` and `steer_texts`: what the two commands do, from their settings."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mechint.config import ExtractConfig, SteerConfig
from mechint.data import iter_texts_from_path, open_activations
from mechint.errors import MechintError
from mechint.inside import Inside, named_sae, open_named, reads_of
from mechint.models import Edit, LanguageModel, load_model
from mechint.provenance import check_output_path, write_json
from mechint.runs import Run
from mechint.sae import SAE
from mechint.steering.direction import (
    Direction,
    check_direction,
    direction_path,
    load_direction,
    save_direction,
)
from mechint.steering.edits import ablate_direction, ablate_latent, add_direction, clamp_direction, clamp_latent
from mechint.steering.extract import (
    check_latent,
    direction_from_latent,
    direction_from_prompts,
    prompt_activations,
    score_direction,
)
from mechint.steering.steer import Steered, steer

Note = Callable[[str], None]
# Rows that the mean norm of a run's activations is taken over: its standard error is then about a percent.
N_NORM_ROWS = 4096
DEFAULT_COEFFICIENTS = (-0.5, 0.5)


def _no_note(note: str) -> None:
    pass


@dataclass(frozen=True)
class Extracted:
    """The direction and where it was written."""

    direction: Direction
    path: Path


def extract(config: ExtractConfig, *, on_note: Note = _no_note) -> Extracted:
    """Extract a direction and save it. What can be wrong is checked before the model is loaded.

    Raises:
        MechintError: an existing output, missing or empty files of prompts, a prompt in both, a latent out of range, an
            unknown model or hook, an SAE that does not fit the model.
    """
    config = named_sae(config) if config.has_sae else config
    classes = _classes(config)
    sets = [iter_texts_from_path(path) for path in (config.positive, config.negative) if path is not None]
    name = config.name or (f"latent-{config.latent}" if config.latent is not None else "-".join(classes))
    if not name or set(name) & set("/\\\0") or name.startswith("."):
        raise MechintError(f"--name {name!r} must be one plain word: it names a folder")
    if config.output is not None:
        path = direction_path(config.output)
    else:
        path = direction_path((config.run_dir or Path()) / "steering" / name)
    if path.exists() and not config.overwrite:
        raise MechintError(f"{path} exists: give another --output or --name, or --overwrite to replace it")
    check_output_path(path)
    inside, model, hook_name, prepend_bos = _place(config, on_note)
    info: dict[str, Any] = {
        "description": config.description,
        "license": config.license,
        "source_paper": config.source_paper,
        "source_run_id": inside.run.path.resolve().name if inside is not None and inside.run is not None else None,
    }
    if config.latent is None:
        direction = direction_from_prompts(
            model,
            hook_name,
            *sets,
            classes=classes,
            name=name,
            method=config.method,
            token=config.token,
            prepend_bos=prepend_bos,
            seed=config.seed,
            **info,
        )
    else:
        assert inside is not None
        at_output = inside.hook_out == inside.hook_name
        norm = run_activation_norm(inside.run) if at_output else None
        direction = direction_from_latent(
            inside.sae, config.latent, model, hook_name, name=name, **info, mean_activation_norm=norm
        )
        if sets:
            found = [
                prompt_activations(model, prompts, hook_name, token=config.token, prepend_bos=prepend_bos)
                for prompts in sets
            ]
            direction = score_direction(direction, found[0].vectors, found[1].vectors, classes)
    return Extracted(direction, save_direction(direction, path, overwrite=config.overwrite))


def _classes(config: ExtractConfig) -> tuple[str, str]:
    """Names of the two classes: those of the files."""
    if config.positive is None or config.negative is None:
        return ("positive", "negative")
    return (config.positive.stem, config.negative.stem)


def _place(config: ExtractConfig, on_note: Note) -> tuple[Inside | None, LanguageModel, str, bool]:
    """The SAE if there is one, and the model, the hook and whether BOS is prepended."""
    if config.has_sae:
        inside = _open(config, config.prepend_bos, on_note)
        return inside, inside.model, inside.hook_out, inside.prepend_bos
    hook_name = config.hook_default
    model = load_model(
        config.model or "pythia-70m",
        device=config.device,
        dtype=config.dtype or "float32",
        processing=config.processing or "raw",
        hook_name=hook_name,
    )
    return None, model, hook_name, config.prepend_bos is not False


def _open(config: ExtractConfig | SteerConfig, prepend_bos: bool | None, on_note: Note) -> Inside:
    latent = config.latent

    def check(sae: SAE) -> None:
        if latent is not None:
            check_latent(sae, latent)

    inside = open_named(config, prepend_bos=prepend_bos, check=check)
    for note in inside.notes:
        on_note(note)
    return inside


def run_activation_norm(run: Run | None) -> float | None:
    """Mean norm of the activations that a run was trained on, BOS rows left out; None if they are not there."""
    if run is None:
        return None
    try:
        activations = open_activations(run.activations_path())
    except MechintError:
        return None
    rows = torch.linspace(0, activations.n_rows - 1, min(N_NORM_ROWS, activations.n_rows)).long()
    if activations.positions is not None and activations.info.get("prepend_bos"):
        rows = rows[activations.positions[rows] > 0]
    return float(activations.rows(rows).norm(dim=-1).mean()) if len(rows) else None


@dataclass(frozen=True)
class Steering:
    """What `steer_texts` found: a list a prompt, its baseline first; `info` says with what it was steered."""

    results: list[list[Steered]]
    info: dict[str, Any]
    output: Path | None


def steer_texts(config: SteerConfig, *, on_note: Note = _no_note) -> Steering:
    """Continue the prompts with and without the edit, and write the JSON if one is asked for.

    Raises:
        MechintError: an existing output, a direction that is broken or does not fit the model, a latent out of range,
            an empty file of prompts, a prompt that is too long, settings out of range.
    """
    config = named_sae(config) if config.latent is not None else config
    if config.output is not None:
        if config.output.exists() and not config.overwrite:
            raise MechintError(f"{config.output} exists: give another --output, or --overwrite to replace it")
        check_output_path(config.output)
    prompts = iter_texts_from_path(config.prompts_path) if config.prompts_path is not None else list(config.prompts)
    if config.latent is not None:
        inside = _open(config, None, on_note)
        model, hook_name, prepend_bos = inside.model, inside.hook_out, inside.prepend_bos
        reads = reads_of(inside.sae, inside.hook_name)
        source: Direction | tuple[SAE, int] = (inside.sae, config.latent)
        norm = run_activation_norm(inside.run) if config.unit == "norm" and reads is None else None
        what = {"latent": config.latent, "checkpoint": str(inside.checkpoint)}
    else:
        assert config.direction is not None
        source = load_direction(config.direction)
        (model, hook_name, prepend_bos), reads = _place_of(source, config), None
        norm = source.info.get("mean_activation_norm")
        what = {"direction": source.name, "sha256": source.info.get("sha256")}
    scale = 1.0
    if config.unit == "norm" and config.mode != "ablate":
        if norm is None:
            norm = prompt_activations(model, prompts, hook_name, prepend_bos=prepend_bos).mean_norm
            on_note(f"nothing says how large activations are: coefficients count in the prompts' mean norm, {norm:.4g}")
        scale = float(norm)
    edits = edits_of(source, config.mode, config.coefficients or DEFAULT_COEFFICIENTS, scale)
    results = steer(
        model,
        prompts,
        hook_name,
        edits,
        reads=reads,
        positions=config.positions,
        prepend_bos=prepend_bos,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        seed=config.seed,
    )
    info = {
        **what,
        "model": model.name,
        "hook_site": hook_name,
        "mode": config.mode,
        "positions": config.positions,
        "unit": scale,
        "temperature": config.temperature,
        "seed": config.seed,
    }
    if config.output is not None:
        rows = [asdict(one) for row in results for one in row]
        write_json(config.output, {**info, "results": rows}, overwrite=config.overwrite)
    return Steering(results, info, config.output)


def _place_of(direction: Direction, config: SteerConfig) -> tuple[LanguageModel, str, bool]:
    """Model, hook and BOS of a direction: what its sidecar says, or the flags where it says nothing."""
    info = direction.info
    name, hook_name = config.model or info.get("model"), config.hook or info.get("hook_site")
    for flag, value in (("--model", name), ("--hook", hook_name)):
        if not value:
            raise MechintError(f"direction {direction.name} has no sidecar that says where it belongs: give {flag}")
    assert name is not None and hook_name is not None
    model = load_model(
        name,
        device=config.device,
        dtype=config.dtype or "float32",
        processing=config.processing or info.get("processing", "raw"),
        hook_name=hook_name,
    )
    check_direction(direction, model, hook_name)
    return model, hook_name, bool(info.get("prepend_bos", True))


def edits_of(
    source: Direction | tuple[SAE, int], mode: str, coefficients: tuple[float, ...], scale: float = 1.0
) -> dict[str, Edit]:
    """The named edits of a mode, one a coefficient; coefficients count in `scale` activation units.

    A latent's activation counts by the length that it writes, so that a coefficient means the same for both sources
    whatever the norm of the decoder row.
    """
    if isinstance(source, Direction):
        if mode == "ablate":
            return {"ablate": ablate_direction(source.vector)}
        make = {"add": add_direction, "clamp": clamp_direction}[mode]
        return {f"{mode} {value:g}": make(source.vector, value * scale) for value in coefficients}
    sae, latent = source
    if mode == "ablate":
        return {"ablate": ablate_latent(sae, latent)}
    row = sae.W_dec[latent].detach()
    norm = float(row.norm())
    if norm == 0:
        raise MechintError(f"latent {latent} writes nothing (its decoder row is zero): choose another")
    if mode == "add":
        return {f"add {value:g}": add_direction(row / norm, value * scale) for value in coefficients}
    scale *= sae.cfg.input_scale / norm
    return {f"clamp {value:g}": clamp_latent(sae, latent, value * scale) for value in coefficients}
