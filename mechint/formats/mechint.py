"""Our own: a run directory, or a checkpoint.pt as the first version of the pipeline wrote it (`b_pre`)."""

import warnings
import zipfile
from dataclasses import replace
from pathlib import Path

from mechint.errors import MechintError
from mechint.formats.base import Format, Loaded, from_sae, not_ours, to_sae
from mechint.provenance import make_dir, write_json
from mechint.sae.io import CFG_FILE, load_sae, metadata_path, save_checkpoint, save_sae_folder

# Most of a .pt file's table of contents that is looked through for the names of its tensors.
PICKLE_BYTES = 1 << 20


def sniff(path: Path) -> bool:
    if path.is_dir():
        return (path / "checkpoint.pt").is_file() or (path / "sae" / CFG_FILE).is_file()
    words = pickle_words(path)
    return b"b_pre" in words and b"W_enc" in words


def pickle_words(path: Path) -> bytes:
    """The start of the pickle in a file that torch saved, as bytes: names of tensors stand in it as they are. Empty
    for any other file. Nothing of it is executed."""
    try:
        with open(path, "rb") as file:
            if file.read(4) != b"PK\x03\x04":
                return b""
        with zipfile.ZipFile(path) as archive:
            name = next((name for name in archive.namelist() if name.endswith("data.pkl")), None)
            if name is None:
                return b""
            with archive.open(name) as member:
                return member.read(PICKLE_BYTES)
    except (OSError, zipfile.BadZipFile, RuntimeError, NotImplementedError, EOFError):
        return b""


def read(path: Path) -> Loaded:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sae = load_sae(path)
    return replace(from_sae(sae), notes=tuple(str(warning.message) for warning in caught))


def holds(loaded: Loaded) -> str | None:
    if (reason := not_ours(loaded)) is not None:
        return reason
    if loaded.scale != 1.0:
        return "a constant input scale"
    if loaded.rescale_acts_by_decoder_norm:
        return "activations rescaled by decoder norms"
    if not loaded.apply_b_dec_to_input:
        return "a b_dec that is not subtracted from the input"
    if loaded.architecture == "jumprelu" and bool((loaded.tensors["threshold"] < 0).any()):
        return "thresholds below 0"
    return None


def write(loaded: Loaded, path: Path) -> None:
    if (reason := holds(loaded)) is not None:
        raise MechintError(f"a mechint checkpoint cannot hold {reason}")
    sae = to_sae(loaded)
    # What is read without a record is taken as the first pipeline's, with centred activations: other tools' are not.
    sae.metadata = {"processing": "raw", **sae.metadata}
    if path.suffix == ".pt":
        save_checkpoint(sae, path)
        write_json(metadata_path(path), {"sae_metadata": sae.metadata})
        return
    make_dir(path)
    save_checkpoint(sae, path / "checkpoint.pt")
    save_sae_folder(sae, path / "sae")


FORMAT = Format(
    name="mechint",
    title="mechint: a run directory, or a checkpoint.pt (also of the first pipeline)",
    marks="checkpoint.pt and sae/cfg.json in a folder, or a .pt of W_enc, b_enc, W_dec and b_pre",
    sniff=sniff,
    read=read,
    write=write,
    holds=holds,
    suffixes=(".pt",),
)
