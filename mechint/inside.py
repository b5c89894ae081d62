"""An SAE in its model: the one place that matches the two. Every reader of an SAE begins with `open_inside`.

Which model, hook, processing and precision: what the SAE's record says. Where it says nothing, a flag may; what a flag
says must not contradict the record, and what neither says is an error, or assumed and told (`notes`). Only files of
the original pipeline, which recorded nothing, are taken to be of the model and the hook that it always used.

A value at a hook is `[batch, pos, d_in]` here: heads lie side by side (`mechint.models`). A transcoder reads
`hook_name` and replaces what `hook_out` holds; for every other SAE the two are one.
"""

import dataclasses
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, TypeVar, Unpack, final

import torch
from jaxtyping import Float
from torch import Tensor

from mechint.config import DEFAULT_HOOK, ReadsSAE, SAETrainConfig, canonical_hook
from mechint.config.base import Unsaid
from mechint.data.store import Activations
from mechint.errors import MechintError
from mechint.formats import plain_form
from mechint.formats.convert import CERTIFICATE_FILE
from mechint.formats.mechint import sniff
from mechint.formats.saelens import CFG_FILE
from mechint.models import BridgedModel, LanguageModel, load_model
from mechint.models.bridge import is_bridge
from mechint.models.language_model import DTYPES
from mechint.provenance import read_json
from mechint.runs import Run
from mechint.sae import SAE

Model = LanguageModel | BridgedModel
ConfigT = TypeVar("ConfigT", bound=ReadsSAE)

# What must be the same for an SAE and the activations it is applied to, beside the width.
SETTING = ("hook_name", "processing", "prepend_bos")
# Hooks that hold the residual stream or what is added to it, under the older and the newer of TransformerLens's names:
# all that centring changes, and all that an unembedding can be applied to.
_RESIDUAL = re.compile(
    r"(.*\.)?hook_(resid_(pre|mid|post)|mlp_out|attn_out|embed|pos_embed)|blocks\.\d+\.(hook_in|((mlp|attn)\.)?hook_out)"
)
# What lies in a run directory from its first step on, beside config.json.
_OF_A_RUN = ("checkpoint.pt", "metrics.csv", "state")
# Roles that SAELens calls special: what else a tokenizer adds, such as the marks of a chat, is text like any other.
_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id")


class Given(TypedDict, total=False):
    """What a caller says of the place. What is left out, or None, is what the SAE was trained with; what is given must
    not contradict it.

    Attributes:
        config: the config.json that belongs to the checkpoint, if it is neither in the checkpoint's folder nor needed.
        model: a model's name or folder in place of the one that the SAE names.
        hook, processing: for an SAE that does not say.
        prepend_bos, context_size: of the texts that are tokenized.
        dtype: precision of the model; that of the collection if not given.
        backend: of the model; the quicker one that has the hooks if not given.
    """

    config: Path | None
    model: str | None
    hook: str | None
    processing: str | None
    prepend_bos: bool | None
    context_size: int | None
    dtype: str | None
    backend: str
    device: str | None
    device_map: str | None


class NotPlaced(MechintError):
    """Nothing says which model or hook an SAE belongs to, or that model cannot be loaded."""


@final
@dataclass(frozen=True)
class Inside:
    """An SAE in its model. Make one with `open_inside`.

    Attributes:
        hook_name: the hook that the SAE reads.
        checkpoint: the file or folder that the weights are from.
        run: the run directory that the checkpoint lies in, if it does.
        prepend_bos, keep_bos: whether BOS stands before each text, and whether the SAE was trained on its row too.
        context_size: most tokens of a text, BOS included; None for the model's own limit.
        notes: in words, what was assumed.
    """

    sae: SAE
    model: LanguageModel
    hook_name: str
    checkpoint: Path
    run: Run | None
    prepend_bos: bool
    keep_bos: bool
    context_size: int | None
    notes: tuple[str, ...] = ()

    @property
    def hook_out(self) -> str:
        """The hook whose value the SAE's output takes the place of."""
        return written_hook(self.sae, self.hook_name)

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text as the SAE's activations were made: BOS and length as there.

        Raises:
            MechintError: no text, or one without any token.
        """
        if not texts:
            raise MechintError("no texts: give at least one")
        found = self.model.tokenize(texts, prepend_bos=self.prepend_bos, context_size=self.context_size)
        for text, tokens in zip(texts, found, strict=True):
            if not tokens:
                raise MechintError(f"the text {text[:40]!r} has no tokens: remove it or prepend BOS")
        return found

    def first_seen(self) -> int:
        """The first position whose activation the SAE was trained on: 1 where BOS rows were left out, else 0."""
        return 1 if self.prepend_bos and not self.keep_bos else 0

    def check_tokens(self, highest: int, where: Path | str) -> None:
        """Raise `MechintError` if the highest token id that `where` holds is none of the model's."""
        if highest >= self.model.d_vocab:
            raise MechintError(
                f"{where} holds token {highest}, but {self.model.name} has {self.model.d_vocab} tokens: another model"
                " made them"
            )


# --- which SAE --------------------------------------------------------------------------------------------------------


def named_sae(config: ConfigT) -> ConfigT:
    """The settings with the command's first argument as `run_dir` if it is a run directory, else as `checkpoint`.

    Raises:
        MechintError: no SAE is named, or two.
    """
    given = {"--run-dir": config.run_dir, "--checkpoint": config.checkpoint}
    if config.sae is None:
        if not any(given.values()):
            raise MechintError(
                "which SAE? Provide --checkpoint or --run-dir, or give it as the first argument: a run directory, or a"
                " folder or file in any format of docs/formats.md"
            )
        return config
    for flag, path in given.items():
        if path is not None and path.resolve() != Path(config.sae).resolve():
            raise MechintError(f"{config.sae} and {flag} {path}: which SAE is it? Give one of them")
    path = Path(config.sae)
    # a folder of another tool may have a config.json too
    is_run = (path / "config.json").is_file() and any((path / name).exists() for name in _OF_A_RUN)
    return dataclasses.replace(config, **{"run_dir" if is_run else "checkpoint": path})


def place_of(config: ReadsSAE) -> Path:
    """What a command with settings of `named_sae` reads. Raises `MechintError` for a run that is not finished."""
    if config.run_dir is not None:
        run = Run(config.run_dir)
        _ = run.checkpoint_path
        return run.path
    path = config.checkpoint
    assert path is not None
    if config.sae is None and not path.exists():
        raise MechintError(f"checkpoint not found: {path}; `ls runs/*/checkpoint.pt` shows those of your runs")
    return path


def run_of(path: Path) -> Run | None:
    """The run directory that `path` is, or lies in."""
    for folder in (path, path.parent):
        if (folder / "config.json").is_file() and (folder / "checkpoint.pt").is_file():
            return Run(folder)
    return None


def output_folder(config: ReadsSAE, flag: str) -> Path:
    """Where a command writes what it finds out of an SAE if `flag` does not say: beside the SAE.

    Raises:
        MechintError: the SAE does not lie in a folder of ours.
    """
    path = place_of(config)
    if config.sae is None:
        return path if path.is_dir() else path.parent
    if (folder := folder_of_ours(path)) is not None:
        return folder
    raise MechintError(f"{config.sae} is no folder that mechint wrote, so nothing is written into it: give {flag}")


def folder_of_ours(path: Path) -> Path | None:
    """The folder that an SAE lies in if a training or a conversion of ours wrote it; None for others' files."""
    folder = path if path.is_dir() else path.parent
    if (run := run_of(path)) is not None:
        return run.path
    if path.suffix == ".pt" and path.is_file():
        return folder
    if (folder / CFG_FILE).is_file():
        metadata = read_json(folder / CFG_FILE).get("metadata")
        if isinstance(metadata, dict) and "mechint_version" in metadata:
            return folder
    return folder if (folder / CERTIFICATE_FILE).is_file() else None


def given_by(config: ReadsSAE) -> Given:
    """What the settings of a command say of the place."""
    return {
        "config": config.config,
        "model": config.model,
        "hook": config.hook,
        "processing": config.processing,
        "dtype": config.dtype,
        "device": config.device,
        "device_map": config.device_map,
    }


def open_named(config: ReadsSAE, /, *, check: Callable[[SAE], object] | None = None, **more: Unpack[Given]) -> Inside:
    """`open_inside` with the settings of a command, after `named_sae`."""
    return open_inside(place_of(config), check=check, **{**given_by(config), **more})


# --- opening ----------------------------------------------------------------------------------------------------------


def open_sae(path: Path, *, config: Path | None = None) -> SAE:
    """`SAE.load` of what a command names, in its plain form, which every fast path knows; what was assumed is in
    `sae.notes` alone. `config` is for a checkpoint that has no record; what says itself where it belongs needs none."""
    needed = config if config is not None and sniff(path) else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return plain_form(SAE.load(path if path.exists() else str(path), config=needed))


def open_inside(
    checkpoint: str | Path, *, check: Callable[[SAE], object] | None = None, **given: Unpack[Given]
) -> Inside:
    """Open anything that `SAE.load` opens, with its model. The SAE ends up on the model's device.

    Args:
        check: called with the SAE before the model is loaded, which may take minutes; raises what is wrong.

    Raises:
        MechintError: files that are missing or broken, an unknown model or hook, an SAE that does not fit the model's
            tokenizer, the hook's width or the processing; the message names both sides.
    """
    path = Path(checkpoint)
    run = run_of(path)
    if path.is_dir() and (path / "checkpoint.pt").is_file():
        path = path / "checkpoint.pt"
    sae = open_sae(path, config=given.get("config"))
    if check is not None:
        check(sae)
    return put_inside(sae, path, run=run, notes=sae.notes, **given)


def put_inside(
    sae: SAE,
    checkpoint: Path,
    *,
    run: Run | None = None,
    known: Mapping[str, Any] | None = None,
    notes: tuple[str, ...] = (),
    **given: Unpack[Given],
) -> Inside:
    """`open_inside` of an SAE that is open already. `known` is what the activations record that it is used with, for
    what it does not record itself.

    Raises:
        NotPlaced: model or hook are not known, or the model cannot be loaded.
        MechintError: the rest.
    """
    said = {key: value for key, value in (known or {}).items() if key != "legacy"}
    said |= {key: value for key, value in sae.metadata.items() if value is not None}
    told = list(notes)
    hook_name = _hook_name(sae, checkpoint, given.get("config"), given.get("hook"), known or {}, told)
    hook_out = written_hook(sae, hook_name)
    model = given.get("model")
    name = model or _model_name(said, told)
    used = _processing(said, given.get("processing"), hook_name, name, told)
    bos = _prepend_bos(said, given.get("prepend_bos"), told)
    recorded_dtype = str(said.get("dtype")).removeprefix("torch.")
    backend = given.get("backend", "auto")
    try:
        loaded = load_model(
            name,
            device=given.get("device"),
            device_map=given.get("device_map"),
            dtype=given.get("dtype") or (recorded_dtype if recorded_dtype in DTYPES else "float32"),
            backend=backend,
            revision=None if model else said.get("model_revision"),
        )
        if used == "centred" and _by_transformer_lens(said) and not loaded.subtracts_mean:
            said["processing"] = "raw"
            told.append(f"TransformerLens centres nothing in {loaded.name}, whose norms do not subtract the mean: raw")
        elif used == "centred":
            loaded.centre()
    except MechintError as error:
        raise NotPlaced(str(error)) from error
    if backend == "auto":
        loaded.choose_backend(hook_name, hook_out)
    check_fit(sae, loaded, hook_name, said)
    if said.get("model_sha256") not in (None, loaded.weights_sha256()):
        told.append(
            f"the weights of {loaded.name} are not bit for bit those that the SAE's activations were collected with"
            " (another revision, or another --dtype)"
        )
    return Inside(
        sae.to(loaded.device),
        loaded,
        hook_name,
        checkpoint,
        run,
        bos,
        bool(said.get("keep_bos", said.get("legacy", False))),
        given.get("context_size") or said.get("context_size"),
        tuple(told),
    )


def _hook_name(
    sae: SAE, path: Path, config: Path | None, hook: str | None, known: Mapping[str, Any], notes: list[str]
) -> str:
    """The hook that the SAE reads; a flag or a config.json may say it where the SAE does not."""
    found: dict[str, str] = {}
    if recorded := sae.hook_in:
        found[str(path)] = recorded
    if config is not None:
        values = SAETrainConfig.from_dict(read_json(config, "config file"), source=str(config))
        if values.hook_name is not None and not isinstance(values.hook_name, Unsaid):
            found[str(config)] = values.hook_name
    if hook is not None:
        found["--hook"] = canonical_hook(hook)
    if recorded := known.get("hook_name"):
        found["the activations' record"] = recorded
    if len(set(found.values())) > 1:
        told = "; ".join(f"{source} says {name}" for source, name in found.items())
        raise MechintError(f"{told}: which hook is it?")
    if found:
        return next(iter(found.values()))
    if sae.metadata.get("legacy"):
        notes.append(f"nothing says which hook {path} belongs to: taken as the original pipeline's")
        return DEFAULT_HOOK
    raise NotPlaced(f"nothing says which hook {path} belongs to: give --hook, such as blocks.3.hook_resid_post")


def _model_name(said: Mapping[str, Any], notes: list[str]) -> str:
    """A local path if it is still there (it was recorded in full), else the name that was typed at collection."""
    name, source = said.get("model_name"), said.get("model_source")
    if source and not str(name).startswith("builtin/") and Path(source).exists():
        return str(source)
    if name or source:
        return str(name or source)
    if said.get("legacy"):
        notes.append("nothing says which model the SAE belongs in: taken as the original pipeline's")
        return "pythia-70m"
    raise NotPlaced("nothing says which model the SAE belongs in: give --model, a Hub id or a folder")


def _processing(said: Mapping[str, Any], given: str | None, hook_name: str, model_name: str, notes: list[str]) -> str:
    """What is recorded, else what is given, else raw."""
    recorded = processing_of(said)
    if given is not None:
        _same_processing(said, given, model_name)
        return given
    if recorded is None and in_residual(hook_name):
        notes.append(
            "nothing says how the SAE's activations were processed: taken as raw, as the model computes them"
            " (--processing centred says otherwise)"
        )
    return recorded or "raw"


def _prepend_bos(said: Mapping[str, Any], given: bool | None, notes: list[str]) -> bool:
    """What is given, else what is recorded, else yes."""
    recorded = said.get("prepend_bos")
    if recorded is None and given is None and not said.get("legacy"):
        notes.append("nothing says whether the SAE was trained on texts with BOS prepended: taken as with it")
    if None not in (recorded, given) and recorded != given:
        words = {True: "with BOS prepended", False: "without BOS"}
        notes.append(
            f"the SAE was trained on texts {words[bool(recorded)]}, and is used here on texts {words[bool(given)]}"
        )
    used = recorded if given is None else given
    return True if used is None else bool(used)


# --- what must fit ----------------------------------------------------------------------------------------------------


def read_hook(sae: SAE) -> str:
    """The hook that an SAE says it reads."""
    if not sae.hook_in:
        raise MechintError(
            "the SAE does not say which hook it was trained on: set sae.cfg.metadata.hook_name, for example to"
            " 'blocks.3.hook_resid_post'"
        )
    return sae.hook_in


def written_hook(sae: SAE, hook_name: str) -> str:
    """The hook whose value the output of an SAE that reads `hook_name` takes the place of."""
    if not sae.is_transcoder:
        return hook_name
    if not sae.hook_out:
        raise MechintError(
            "the transcoder does not say which hook it writes: set sae.cfg.metadata.hook_name_out, for example to"
            " 'blocks.3.hook_mlp_out'"
        )
    return sae.hook_out


def reads_of(sae: SAE, hook_name: str) -> str | None:
    """`reads` of `LanguageModel.logits_with`: the hook that a transcoder reads; None where input and output are one."""
    return None if written_hook(sae, hook_name) == hook_name else hook_name


def written_acts(sae: SAE, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
    """`feature_acts` in units of the output: times its decoder row, each is what a latent adds to the reconstruction.
    They are `encode`'s but where an SAE normalises or scales its input, which is undone behind the decoder."""
    feature_acts, scale = sae.encode(x), sae.output_scale()
    return feature_acts if isinstance(scale, float) and scale == 1.0 else feature_acts * scale


def as_model(model: Any) -> Model:
    """A `LanguageModel` as it is, a `TransformerBridge` behind the same methods; anything else is an error."""
    if isinstance(model, Model):
        return model
    if is_bridge(model):
        return BridgedModel(model)
    raise MechintError(
        f"model should be a LanguageModel (mechint.models.load_model) or a TransformerBridge, got"
        f" {type(model).__name__}"
    )


def check_fit(sae: SAE, model: Model, hook_name: str, said: Mapping[str, Any] | None = None) -> None:
    """Raise `MechintError` unless the SAE was trained at this hook, in this processing, with this tokenizer, and has
    the widths of the hooks that it reads and writes. `said` is its record, if that is more than its metadata."""
    said = sae.metadata if said is None else said
    model.check_hook(hook_name)
    if (head := sae.metadata.get("hook_head_index")) is not None:
        raise MechintError(
            f"the SAE is of head {head} of {hook_name} alone; here SAEs are put into a model with all heads of a hook:"
            " sae.encode takes the values of that head"
        )
    if sae.hook_in is not None and sae.hook_in != hook_name:
        raise MechintError(f"the SAE was trained on {sae.hook_in}, but is to be used at {hook_name}")
    hook_out = written_hook(sae, hook_name)
    for name, dimension, d_sae_has in ((hook_name, "d_in", sae.d_in), (hook_out, "d_out", sae.d_out)):
        shape, width = model.hook_shape(name), model.hook_width(name)
        if width != d_sae_has:
            heads = f" ({shape[0]} heads of {shape[1]})" if len(shape) > 1 else ""
            raise MechintError(
                f"the SAE has {dimension} {d_sae_has}, but {name} of {model.name} is {width} wide{heads}: give the"
                " model that the SAE was trained on"
            )
    if hook_out != hook_name:
        model.logits_with(torch.zeros(1, 2, dtype=torch.int64), hook_out, lambda value, x: value, reads=hook_name)
    check_identity(said, model)
    processing = model.processing
    if processing is None and hook_name.rpartition(".")[2].startswith("hook_resid"):
        # A residual stream whose mean is rounding error has been centred.
        hooked = model.activations(torch.zeros(1, 2, dtype=torch.int64), hook_name)
        centred = hooked.float().mean(-1).abs().max() < 1e-4 * hooked.float().pow(2).mean().sqrt()
        processing = "centred" if centred else "raw"
    if processing is not None:
        _same_processing(said, processing, model.name)


def check_identity(said: Mapping[str, Any], model: Model) -> None:
    """Raise `MechintError` if the SAE's record names another vocabulary or tokenizer; what is not recorded, fits."""
    trained = said.get("model_name") or "another model"
    if (d_vocab := said.get("d_vocab")) not in (None, model.d_vocab):
        raise MechintError(
            f"the SAE was trained on {trained} with a vocabulary of {d_vocab} tokens, but {model.name} has"
            f" {model.d_vocab}: give the model that the SAE was trained on"
        )
    recorded = said.get("tokenizer_sha256")
    # TransformerLens may add tokens to the tokenizer of a bridge
    if recorded is None or isinstance(model, BridgedModel) or recorded == model.tokenizer_sha256():
        return
    raise MechintError(
        f"the SAE was trained on texts that the tokenizer of {trained} cut, but that of {model.name} is another one"
        f" (SHA-256 {recorded[:12]}, now {model.tokenizer_sha256()[:12]}): give the model that the SAE was trained on"
    )


def check_same_setting(sae: SAE, activations: Activations, checkpoint: Path) -> None:
    """Raise `MechintError` if the SAE was trained on activations of another width, hook, processing or BOS rule."""
    if activations.d_in != sae.d_in:
        raise MechintError(
            f"{activations.path} holds vectors of width {activations.d_in}, but {checkpoint} has d_in {sae.d_in}: they"
            " do not belong together; give the right ones with --activations-path"
        )
    assumed = " (assumed, the checkpoint does not say)" if sae.metadata.get("legacy") else ""
    for key in SETTING:
        of_sae, of_rows = sae.metadata.get(key), activations.info.get(key)
        if of_sae is None or of_rows is None or of_sae == of_rows:
            continue
        remedy = "give the right ones with --activations-path"
        if assumed:
            remedy = "give its config.json with --config if it was trained on these, or collect with --preset mech-int"
        raise MechintError(
            f"{checkpoint} was trained on {key} {of_sae!r}{assumed if key != 'hook_name' else ''}, but"
            f" {activations.path} was collected with {key} {of_rows!r}: {remedy}"
        )


def processing_of(said: Mapping[str, Any]) -> str | None:
    """ "raw" or "centred", as the record of an SAE says in our words or in SAELens's; None if it does not say."""
    if (recorded := said.get("processing")) is not None:
        return str(recorded)
    centred = (said.get("model_from_pretrained_kwargs") or {}).get("center_writing_weights")
    return None if centred is None else "centred" if centred else "raw"


def _by_transformer_lens(said: Mapping[str, Any]) -> bool:
    """Whether it was left to TransformerLens to centre, by SAELens's setting."""
    return bool((said.get("model_from_pretrained_kwargs") or {}).get("center_writing_weights"))


def _same_processing(said: Mapping[str, Any], processing: str, model_name: str) -> None:
    """An assumed processing (of the original's files) may be overruled."""
    recorded = processing_of(said)
    if recorded not in (None, processing) and not said.get("legacy"):
        raise MechintError(
            f"the SAE was trained on {recorded} activations, but {model_name} is used with processing {processing}:"
            f" load it with processing {recorded}"
        )


def centres(sae: SAE, hook_name: str, model: LanguageModel) -> bool:
    """Whether the mean over d_model has to be taken off what `hook_name` holds for this SAE.

    Raises:
        MechintError: the model takes off a mean that the SAE was trained with.
    """
    if not in_residual(hook_name):
        return False
    trained, here = processing_of(sae.metadata) or "raw", model.processing
    if trained == "raw" and here == "centred":
        raise MechintError(
            f"the SAE was trained on the raw {hook_name}, but {model.name} is loaded with"
            " center_writing_weights=True, which takes the mean out: load it without"
        )
    return trained == "centred" and here == "raw"


def in_residual(hook_name: str) -> bool:
    """Whether a hook holds the residual stream or what is added to it."""
    return _RESIDUAL.fullmatch(hook_name) is not None


def special_tokens(tokenizer: Any) -> frozenset[int]:
    """Ids of BOS, EOS, padding and separators."""
    found = (getattr(tokenizer, role, None) for role in _SPECIAL)
    return frozenset(int(token) for token in found if token is not None)
