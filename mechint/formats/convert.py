"""From any format to any other: find out what files are, fold what has to be folded, write, read back, compare."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mechint import __version__
from mechint.errors import MechintError, nearest
from mechint.formats import FORMATS, mechint
from mechint.formats.base import Format
from mechint.formats.certificate import Certificate, certify
from mechint.formats.limits import held_variant
from mechint.formats.mechint import LEGACY_SETTING
from mechint.provenance import fsync_dir, make_dir, read_json, scratch_folder, sha256_file, write_json
from mechint.sae.base import SAE

CERTIFICATE_FILE = "certificate.json"
# Widths of the residual stream of well-known models. A hint: most widths belong to several models.
MODELS_OF_WIDTH = {
    128: ("builtin/pythia-tiny",),
    512: ("EleutherAI/pythia-70m",),
    768: ("gpt2", "EleutherAI/pythia-160m"),
    1024: ("gpt2-medium", "EleutherAI/pythia-410m"),
    1280: ("gpt2-large",),
    1600: ("gpt2-xl",),
    2048: ("google/gemma-2b", "EleutherAI/pythia-1b", "EleutherAI/pythia-1.4b", "meta-llama/Llama-3.2-1B"),
    2304: ("google/gemma-2-2b",),
    2560: ("EleutherAI/pythia-2.8b",),
    3072: ("google/gemma-7b", "meta-llama/Llama-3.2-3B"),
    3584: ("google/gemma-2-9b",),
    4096: ("meta-llama/Llama-2-7b", "meta-llama/Llama-3.1-8B", "EleutherAI/pythia-6.9b"),
    4544: ("tiiuae/falcon-7b",),
    5120: ("meta-llama/Llama-2-13b", "EleutherAI/pythia-12b"),
    8192: ("meta-llama/Llama-2-70b",),
}
# Weights that say nothing without their cfg.json.
BARE_WEIGHTS = ("sae_weights.safetensors", "sae.safetensors")
# What an SAE's files should say so that it can be put back into its model.
WANTED = ("model_name", "hook_name", "processing", "prepend_bos")


@dataclass(frozen=True)
class Identified:
    """What the files at a path are.

    Attributes:
        formats: names of all formats that they look like; the first one was read.
        sae: the SAE, or None where it could not be read.
        problem: why not.
        missing: what the files do not say of the SAE's origin.
        model_hint: models of this width, or the one that the files name. Never more than a hint in the first case.
    """

    path: Path
    formats: tuple[str, ...]
    sae: SAE | None
    problem: str | None
    missing: tuple[str, ...]
    model_hint: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = {"path": str(self.path), "formats": list(self.formats), "problem": self.problem}
        if (sae := self.sae) is None:
            return found
        return found | {
            "architecture": sae.architecture,
            "transcoder": sae.is_transcoder,
            "d_in": sae.d_in,
            "d_sae": sae.d_sae,
            "d_out": sae.d_out,
            "options": {**sae.saved_options(), **sae.departing()},
            "tensors": {name: list(tensor.shape) for name, tensor in sae.named_parameters()},
            "apply_b_dec_to_input": sae.cfg.apply_b_dec_to_input,
            "normalize_activations": sae.cfg.normalize_activations,
            "input_scale": sae.cfg.input_scale,
            "sparsity": sae.sparsity is not None,
            "metadata": dict(sae.metadata),
            "missing": list(self.missing),
            "model_hint": list(self.model_hint),
            "opens_here": True,
            "notes": list(sae.notes),
        }


def find_format(name: str, *, to: bool = False) -> Format:
    """The format of a name. Raises `MechintError` with the nearest one, or where it cannot be written."""
    if name not in FORMATS:
        raise MechintError(f"unknown format {name!r}; {nearest(name, FORMATS)}")
    found = FORMATS[name]
    if (found.write if to else found.read) is None:
        raise MechintError(f"{found.title} is only {'read' if to else 'written'} here; docs/formats.md lists all")
    return found


def formats_of(path: Path) -> tuple[Format, ...]:
    """Every format that can be read and that the files at `path` look like."""
    if not path.exists():
        raise MechintError(f"{path} does not exist")
    return tuple(found for found in FORMATS.values() if found.read is not None and found.sniff(path))


def inside(path: Path) -> tuple[Path, ...]:
    """The SAEs in a folder that holds several: its entries that are SAEs, where it is none itself."""
    if not path.is_dir():
        return ()
    own = set(formats_of(path))
    found = {entry: set(formats_of(entry)) for entry in sorted(path.iterdir()) if not entry.name.startswith(".")}
    if not own:
        return tuple(entry for entry, formats in found.items() if formats)
    # some formats take a folder of such folders for themselves; a run directory's own sae/ is of another one
    same = tuple(entry for entry, formats in found.items() if entry.is_dir() and formats & own)
    return same if len(same) > 1 else ()


def load(path: str | Path, *, from_format: str | None = None) -> tuple[Format, SAE]:
    """Read an SAE in whatever format it is.

    Raises:
        MechintError: no format, or several of them, or files that are broken.
    """
    path = Path(path)
    if from_format is not None:
        if not path.exists():
            raise MechintError(f"{path} does not exist")
        chosen = find_format(from_format)
    else:
        candidates = formats_of(path)
        if several := inside(path):
            names = ", ".join(entry.name for entry in several[:6])
            raise MechintError(f"{path} holds {len(several)} SAEs; give one of them: {names}")
        if len(candidates) > 1:
            names = ", ".join(found.name for found in candidates)
            raise MechintError(f"{path} could be any of {names}: say which with --from")
        chosen = next(iter(candidates), None)
        if chosen is None:
            if path.suffix == ".pt" and path.is_file():
                mechint.read(path)  # says what is wrong with it
            raise MechintError(unknown_in_words(path))
    assert chosen.read is not None
    return chosen, chosen.read(path)


def unknown_in_words(path: Path) -> str:
    """Why nothing opens `path`, and what would help."""
    folder = path if path.is_dir() else path.parent
    if (path / "store.json").is_file():
        return f"{path} holds activations, not an SAE: --activations-path takes it"
    weights = next((name for name in BARE_WEIGHTS if (folder / name).is_file()), None)
    if weights is not None and not (folder / "cfg.json").is_file():
        return (
            f"{folder / weights} lies there without cfg.json: nothing says which activation function it has and whether"
            " b_dec is subtracted; name it sae_weights.safetensors (if W_enc is [d_in, d_sae]) and write a cfg.json"
            " with architecture, d_in, d_sae and apply_b_dec_to_input beside it"
        )
    return (
        f"{path} is in none of the formats that open here ({', '.join(FORMATS)}); docs/formats.md says what their files"
        " look like"
    )


def identify(path: str | Path) -> Identified:
    """What the files are, without raising for broken ones. Raises `MechintError` if nothing is at `path`."""
    path = Path(path)
    names = tuple(found.name for found in formats_of(path))
    sae, problem = None, None
    try:
        sae = load(path, from_format=names[0] if names and not inside(path) else None)[1]
    except MechintError as error:
        problem = str(error)
    if sae is None:
        return Identified(path, names, None, problem, (), ())
    missing = tuple(name for name in WANTED if sae.metadata.get(name) is None or name in assumed(sae))
    named = sae.metadata.get("model_name")
    hint = (str(named),) if named else MODELS_OF_WIDTH.get(sae.d_in, ())
    return Identified(path, names, sae, problem, missing, hint)


def assumed(sae: SAE) -> tuple[str, ...]:
    """Names in its metadata that no file said: those of a checkpoint of the first pipeline."""
    return tuple(name for name in LEGACY_SETTING if name != "legacy") if sae.metadata.get("legacy") else ()


def convert(
    source: str | Path,
    output: str | Path,
    *,
    to: str = "mechint",
    from_format: str | None = None,
    overwrite: bool = False,
    pad: bool = False,
    n_probes: int = 192,
    seed: int = 0,
) -> tuple[Certificate, Path]:
    """Write the SAE at `source` as format `to` at `output`, and prove it: `(certificate, its file)`.

    Files are written beside `output` and moved there once they are read back and hold. `pad`: give a topk k more
    latents that are always 0 (`folds.pad_topk`).

    Raises:
        MechintError: see `load`; a format that cannot hold the SAE; an `output` that exists without `overwrite`; a
            written file that computes something else (our mistake or a broken disk: nothing is kept).
    """
    source, target = Path(source), find_format(to, to=True)
    check_output(destination(Path(output), target), overwrite)
    origin, sae = load(source, from_format=from_format)
    extra = {"source": {"path": str(source), "format": origin.name, **_hash(source)}}
    settings: dict[str, Any] = {"overwrite": overwrite, "pad": pad, "n_probes": n_probes, "seed": seed}
    return write_proved(sae, Path(output), target, extra=extra, **settings)


def convert_each(source: str | Path, output: str | Path, **arguments: Any) -> dict[Path, tuple[Certificate, Path]]:
    """`convert` of every SAE in a folder that holds several, into folders of the same names; else of `source` itself.

    Returns:
        What `convert` returns, under the place of each output.
    """
    source, output = Path(source), Path(output)
    several = () if arguments.get("from_format") or not source.exists() else inside(source)
    if not several:
        return {output: convert(source, output, **arguments)}
    if output.suffix and output.suffix in find_format(arguments.get("to", "mechint"), to=True).suffixes:
        raise MechintError(f"{source} holds {len(several)} SAEs: {output} should be a folder")
    places = {entry: output / (entry.stem if entry.is_file() else entry.name) for entry in several}
    if len(set(places.values())) < len(places):
        raise MechintError(f"{source} holds files that differ in their suffix only; convert them one by one")
    return {place: convert(entry, place, **arguments) for entry, place in places.items()}


def write_proved(
    sae: SAE,
    output: Path,
    target: Format,
    *,
    overwrite: bool = False,
    pad: bool = False,
    n_probes: int = 192,
    seed: int = 0,
    extra: dict[str, Any] | None = None,
) -> tuple[Certificate, Path]:
    """`convert` from an SAE that is loaded already; `extra` goes into the certificate."""
    assert target.write is not None
    output = destination(output, target)
    as_file = target.is_file(output)
    check_output(output, overwrite)
    variant, folded = held_variant(sae, target, pad=pad)
    make_dir(output.parent)
    with scratch_folder(output) as scratch:
        stage = scratch / "stage"
        written = stage / output.name if as_file else stage
        stage.mkdir()
        target.write(variant, written)
        back = _read_back(target, written)
        certificate = certify(sae, back, folded=folded, n_probes=n_probes, seed=seed)
        _require_proof(certificate, target)
        record = {"mechint_version": __version__, "format": target.name, **(extra or {}), **certificate.to_dict()}
        record["notes"] = [*sae.notes, *said_of(sae, back, target)]
        if not as_file:
            write_json(stage / CERTIFICATE_FILE, record | {"files": sorted(files_in(stage))})
            _replace_folder(stage, output, scratch / "old")
            return certificate, output / CERTIFICATE_FILE
        beside = output.name + "." + CERTIFICATE_FILE
        write_json(stage / beside, record)
        entries = sorted(stage.iterdir(), key=lambda entry: entry.name == output.name)  # the SAE itself last
        for entry in entries:
            check_output(output.parent / entry.name, overwrite)
        for entry in entries:
            os.replace(entry, output.parent / entry.name)
        fsync_dir(output.parent)
        return certificate, output.parent / beside


def _read_back(target: Format, written: Path) -> SAE:
    if target.read is None:
        raise MechintError(f"{target.title} is not read here, so nothing proves what is written")
    return target.read(written)


def _require_proof(certificate: Certificate, target: Format) -> None:
    if not certificate.holds:
        raise MechintError(
            f"as {target.title} it computes something else (codes differ by {certificate.encode_difference:.1e},"
            f" reconstructions by {certificate.decode_difference:.1e}, allowed {certificate.tolerance:.0e}); not kept"
        )


def said_of(sae: SAE, back: SAE, target: Format) -> list[str]:
    """What is to be known of the written files: what their reader says, and what they have no place for."""
    notes = [note for note in back.notes if note not in sae.notes]
    if sae.sparsity is not None and back.sparsity is None:
        notes.append(f"left out, because {target.title} has no place for it: sparsity")
    if added := back.d_sae - sae.d_sae:
        notes.append(f"the last {added} latents are of zeros: they keep the top-k from choosing negative entries")
    return notes


def destination(output: Path, target: Format) -> Path:
    """Where the SAE will lie: `output`, or the format's one file in the folder `output`."""
    return output / target.file_name if target.file_name and not target.is_file(output) else output


def check_output(output: Path, overwrite: bool) -> None:
    """Raise `MechintError` if there is something at `output` that may not be replaced."""
    if output.is_dir() and not any(output.iterdir()):
        return
    if output.exists() and not overwrite:
        raise MechintError(f"{output} exists: give another place, or --overwrite")
    if not output.is_dir():
        return
    if not (output / CERTIFICATE_FILE).is_file():
        raise MechintError(f"{output} is a folder that no conversion wrote; remove it yourself or give another place")
    recorded = read_json(output / CERTIFICATE_FILE, "certificate").get("files")
    others = files_in(output) - set(recorded if isinstance(recorded, list) else ())
    if others:
        raise MechintError(
            f"{output} holds what no conversion wrote ({', '.join(sorted(others)[:4])}); remove it yourself or give"
            " another place"
        )


def files_in(folder: Path) -> set[str]:
    """Files below a folder, relative to it, without its certificate."""
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    return found - {CERTIFICATE_FILE}


def _replace_folder(stage: Path, output: Path, aside: Path) -> None:
    """Rename `stage` to `output`; what was there goes `aside`, to be removed with it."""
    if output.exists():
        os.replace(output, aside)
    try:
        os.replace(stage, output)
    except OSError:
        if aside.exists():
            os.replace(aside, output)
        raise
    fsync_dir(output.parent)
    if aside.exists():
        shutil.rmtree(aside, ignore_errors=True)


def _hash(source: Path) -> dict[str, Any]:
    """SHA-256 of a source that is one file."""
    return {"sha256": sha256_file(source)} if source.is_file() else {}


def shapes_in_words(sae: SAE) -> str:
    """`W_enc [512, 4096]  b_enc [4096] ...`, in a fixed order."""
    return "  ".join(f"{name} {list(value.shape)}" for name, value in sae.named_parameters())
