"""`SAE`: the one class. It is what training trains, what files are read into, and what every command and script uses.

An architecture is one final class in one file of `mechint/sae/architectures/`; defining it registers it (see
docs/extend.md). It says how pre-activations become `feature_acts` (`activate`), and what training minimises (`loss`, in
plain autograd: the reference for every faster path). Here is what all of them share:

    u     = normalised(input_scale * x) - b_dec      (without b_dec where apply_b_dec_to_input is off)
    f     = activate(u @ W_enc + b_enc)
    x_hat = undone(f @ W_dec + b_dec) / input_scale  (a transcoder undoes nothing; with W_skip it adds x @ W_skip^T)

Most SAEs do nothing to their input but subtract `b_dec`; the rest is there for those of other tools.
"""

import copy
import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mechint.errors import MechintError, nearest
from mechint.provenance import detect_device
from mechint.sae.config import NORMALIZE, Architecture, SAEConfig, SAEMetadata, dtype_of, reshape_activations
from mechint.sae.elsewhere import ELSEWHERE, ElsewhereError
from mechint.sae.hooks import Hooked, HookPoint
from mechint.sae.objective import Loss, Objective
from mechint.sae.peers import ALONE, Peers
from mechint.sae.tensors import fitting, widths_of

# A row shorter than this is divided by this instead, so that an all-zero row stays finite.
MIN_DECODER_NORM = 1e-12
# SAELens and OpenAI's sparse_autoencoder: what layer norm adds to the standard deviation.
LAYER_NORM_EPS = 1e-5
# Settings of `SAEConfig` that an SAE of any architecture may have.
SETTINGS = {"apply_b_dec_to_input", "normalize_activations", "input_scale", "rescale_acts_by_decoder_norm", "metadata"}
# Activation functions of transcoders: SAELens has no top-k ones, EleutherAI's sparsify has.
BASES = ("standard", "jumprelu", "topk")
ARCHITECTURES: dict[str, type["SAE"]] = {}


class SAE(Hooked, ABC):
    """A sparse autoencoder (or transcoder). `SAE.load(anything)` opens one; `SAE(SAEConfig(...))` makes a new one.

    `sae(x)` is the reconstruction, `sae.encode(x)` are the `feature_acts`, `sae.run(x)` is both. Leading shapes are
    free; an SAE of all heads of a hook (`hook_z`) takes them one by one too, `[..., head, d_head]`.

    Parameters: `W_enc [d_in, d_sae]`, `W_dec [d_sae, d_out]`, `b_dec [d_out]`; `b_enc [d_sae]`, but gated SAEs have
    `b_gate`, `b_mag` and `r_mag` instead; JumpReLU ones a `threshold` too; `W_skip [d_out, d_in]` of transcoders that
    have a skip connection. `d_out` is `d_in`, but for transcoders, which write another hook than they read.

    Biases start at 0, the weights Xavier-normal and independent of each other, then the rows of `W_dec` are divided by
    their norms. Drawn from `generator` if given, else from torch's global one. `W_enc` lies column by column in memory:
    the encoder column of a latent is contiguous, as its decoder row is.

    Attributes:
        cfg: an `SAEConfig`. `cfg.metadata`, which is `sae.metadata` too, says what it was trained on (hook_name,
            model_name, processing, prepend_bos, ...); a name that is not there is not known.
        sparsity: log10 of how often each latent fires, `[d_sae]`, if that is known.
        notes: in words, what was assumed when it was read.
        use_error_term: whether a call adds what the SAE misses, so that its output is its input unless functions at
            its hook points change something on the way.
    """

    architecture: ClassVar[str]
    # Settings of the architecture beside the widths, with their defaults; keyword arguments of the class.
    options: ClassVar[dict[str, Any]] = {}
    # Parameters `[d_sae]`, and what they start at.
    latent_vectors: ClassVar[dict[str, float]] = {"b_enc": 0.0}
    # Those options that are numbers of latents, or tuples of them: a smaller SAE of the same kind has smaller ones.
    latent_counts: ClassVar[tuple[str, ...]] = ()
    # What its file holds, parameters and options; no two architectures hold the same, so that a checkpoint.pt alone
    # says what it is. Empty: never saved as such (its `saved_form` is another architecture).
    saved_tensors: ClassVar[tuple[str, ...]] = ()
    # Settings that only SAEs of other tools depart from: no flag reaches them, and a file holds one only where it is
    # another than this. SAELens's layout has no place for them.
    departures: ClassVar[dict[str, Any]] = {}
    # Whether AuxK takes only positive pre-activations: where selection, not a bias, keeps latents off (Gao et al.).
    aux_relu: ClassVar[bool] = False
    # Whether the decoder's row norms scale the penalty, so that decoder rows need not have unit norm.
    has_l1: ClassVar[bool] = False
    # Whether `Objective.sparsity` weighs anything: not where a number of latents decides how sparse codes are.
    has_penalty: ClassVar[bool] = True
    # Whether loss and encode ask `peers` wherever they sum over latents or choose between them, so that processes can
    # have a share of the latents each.
    shardable: ClassVar[bool] = False
    # Whether what a latent is depends on no other latent, so that `only` gives what `encode` gives.
    latents_are_independent: ClassVar[bool] = False

    # The processes that share a training step; while they share the latents, parameters hold this process's only.
    peers: Peers = ALONE

    cfg: SAEConfig
    W_enc: nn.Parameter
    W_dec: nn.Parameter
    b_dec: nn.Parameter
    b_enc: nn.Parameter

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        name = cls.__dict__.get("architecture")
        if name is None:  # what several architectures share
            return
        if ARCHITECTURES.get(name, cls).__qualname__ != cls.__qualname__:
            raise TypeError(f"two classes call themselves architecture {name!r}")
        ARCHITECTURES[name] = cls

    def __new__(cls, cfg: Any = None, *_: Any, **__: Any) -> "SAE":
        if cls is not SAE:
            return super().__new__(cls)
        if not isinstance(cfg, SAEConfig):
            raise MechintError("SAE(cfg) makes a new SAE from an SAEConfig; SAE.load(path or name) opens one")
        kinds = [Architecture.of_transcoder(base, skip=skip) for base in BASES for skip in (False, True)]
        if cfg.architecture not in (*ARCHITECTURES, *kinds):
            known = (*ARCHITECTURES, *kinds)
            raise MechintError(f"unknown architecture {str(cfg.architecture)!r}; {nearest(cfg.architecture, known)}")
        return object.__new__(ARCHITECTURES[cfg.base_architecture])

    def __init__(
        self,
        d_in: int | SAEConfig,
        d_sae: int | None = None,
        *,
        generator: torch.Generator | None = None,
        **settings: Any,
    ):
        super().__init__()
        cfg = d_in if isinstance(d_in, SAEConfig) else self._config(d_in, d_sae, settings)
        self.cfg = dataclasses.replace(cfg, metadata=SAEMetadata(cfg.metadata))
        if min(cfg.d_in, cfg.d_sae) < 1:
            raise MechintError(f"an SAE needs d_in >= 1 and d_sae >= 1, got {cfg.d_in} and {cfg.d_sae}")
        if cfg.normalize_activations not in NORMALIZE:
            raise MechintError(
                f"normalize_activations {cfg.normalize_activations!r} is not known; {', '.join(NORMALIZE)}"
            )
        if not 0 < cfg.input_scale < float("inf"):
            raise MechintError(f"inputs are scaled by {cfg.input_scale!r}, expected a number above 0")
        if self.is_transcoder and not cfg.d_out:
            raise MechintError("a transcoder needs d_out, the width of what it writes")
        if self.is_transcoder and (cfg.normalize_activations != "none" or cfg.input_scale != 1.0):
            changed = f"normalize_activations {cfg.normalize_activations!r}, input_scale {cfg.input_scale:g}"
            raise MechintError(
                f"a transcoder whose input is changed before encoding ({changed}) has no definition here"
            )
        if cfg.rescale_acts_by_decoder_norm and self.architecture != "topk":
            raise MechintError(f"rescale_acts_by_decoder_norm belongs to topk, this is {self.architecture}")
        given = dict(cfg.options) if cfg.k is None else {**cfg.options, "k": cfg.k}
        for name, usual in {**self.options, **self.departures}.items():
            setattr(self, name, given.get(name, usual))
        self.check_options()
        if "k" in self.options:
            self.cfg.k = self.k  # type: ignore[attr-defined]
        usual = {**self.options, **self.departures, "k": given.get("k")}
        self.cfg.options = {name: value for name, value in given.items() if value != usual.get(name)}
        for name in ("sae_input", "sae_acts_pre", "sae_acts_post", "sae_recons", "sae_error", "sae_output"):
            self.add_module(f"hook_{name}", HookPoint(f"hook_{name}"))
        # False: rows of W_dec are free, every penalty and selection weighs feature_acts by their norms, and saving
        # folds the norms into the encoder.
        self.unit_decoder = True
        self.use_error_term = False
        self.sparsity: Tensor | None = None
        self.notes: tuple[str, ...] = ()
        # what was done to the last input, for a `decode` that is called on its own
        self._undo: tuple[Tensor, Tensor] | None = None
        self._reshaping: bool | None = None
        self._make_parameters()
        if self.W_enc.is_meta:  # shapes only, values come from a file; random ops on meta import torch's compiler
            return
        with torch.no_grad():
            self._draw(generator)
        if isinstance(d_in, SAEConfig):
            self.to(device=usable(cfg.device), dtype=dtype_of(cfg.dtype))

    def _config(self, d_in: int, d_sae: int | None, settings: dict[str, Any]) -> SAEConfig:
        if d_sae is None:
            raise MechintError(f"{type(self).__name__}(d_in, d_sae): d_sae is missing; or give it an SAEConfig")
        own = {name: value for name, value in settings.items() if name in (*self.options, *self.departures)}
        for name in settings.keys() - own.keys() - SETTINGS:
            names = (*self.options, *sorted(SETTINGS))
            raise MechintError(f"{type(self).__name__} has no setting {name!r}; {nearest(name, names)}")
        rest = {name: value for name, value in settings.items() if name not in own}
        if "metadata" in rest:
            rest["metadata"] = SAEMetadata(rest["metadata"])
        k = own.pop("k", None)
        return SAEConfig(d_in, d_sae, self.architecture, k=k, options=own, **rest)

    def _make_parameters(self) -> None:
        d_in, d_sae, d_out = self.d_in, self.d_sae, self.d_out
        vectors = {name: nn.Parameter(torch.full((d_sae,), float(at))) for name, at in self.vectors().items()}
        # in this order, which is that of the optimizer's state in every run so far
        self.W_enc = nn.Parameter(torch.empty(d_sae, d_in).t())
        if "b_enc" in vectors:
            self.b_enc = vectors.pop("b_enc")
        self.W_dec = nn.Parameter(torch.empty(d_sae, d_out))
        self.b_dec = nn.Parameter(torch.zeros(d_out))
        for name, vector in vectors.items():
            self.register_parameter(name, vector)
        if self.cfg.has_skip:
            self.W_skip = nn.Parameter(torch.zeros(d_out, d_in))

    def vectors(self) -> dict[str, float]:
        """`latent_vectors` of this SAE; an architecture whose options say where they start extends it."""
        return dict(self.latent_vectors)

    def _draw(self, generator: torch.Generator | None) -> None:
        """First weights. A transcoder's are SAELens's: uniform by He et al. 2015, with free decoder rows."""
        if self.is_transcoder:
            self.W_enc.copy_(nn.init.kaiming_uniform_(torch.empty(self.d_in, self.d_sae), generator=generator))
            nn.init.kaiming_uniform_(self.W_dec, generator=generator)
            return
        # drawn row by row, so that the numbers do not depend on the layout
        self.W_enc.copy_(nn.init.xavier_normal_(torch.empty(self.d_in, self.d_sae), generator=generator))
        nn.init.xavier_normal_(self.W_dec, generator=generator)
        self.renormalize_decoder()

    def check_options(self) -> None:
        """Options in their own types. Raises `MechintError` for what they cannot be."""

    # --- from and to files --------------------------------------------------------------------------------------------

    @classmethod
    def load(
        cls,
        source: str | Path,
        *,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype | None = None,
        **given: Any,
    ) -> "SAE":
        """Open an SAE: `mechint.sae.load.load`, which says what `source` can be. The weights are those of the file."""
        from mechint.sae.load import load  # the door is built on the formats, and they on this class

        return load(source, **given).to(device=usable(device), dtype=dtype_of(dtype))

    @classmethod
    def from_pretrained(
        cls,
        release: str,
        sae_id: str = "",
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype = "float32",
        force_download: bool = False,
        converter: Any = None,
        fold_W_dec_norm: bool = False,
        registry: str | Path | None = None,
    ) -> "SAE":
        """SAELens's way to open one: a release, `user/repo` on the Hugging Face Hub, or a local folder.

        The result is the SAE, and also unpacks as the triple that SAELens returned before version 6:
        `sae, cfg_dict, sparsity = SAE.from_pretrained(...)`.

        Args:
            release: a name of a registry file (docs/saelens.md), a Hub repository, or a folder.
            sae_id: the release's name of the SAE; in a repository or folder, the path to it.
            converter: not taken; the formats of docs/formats.md are recognised.
            registry: a registry file in place of those that are found by themselves.

        Raises:
            MechintError: no such release, repository or id (the message names those that are near), the Hub out of
                reach and nothing in the cache, files that are no SAE, or a device that this machine does not have.
        """
        from mechint.sae.load import load_release

        _no_converter(converter)
        device = usable(device)  # known before anything is downloaded
        sae = load_release(release, sae_id, registry=registry, force_download=force_download)
        return _folded(sae.to(device=device, dtype=dtype_of(dtype)), fold_W_dec_norm)

    @classmethod
    def from_pretrained_with_cfg_and_sparsity(
        cls, release: str, sae_id: str = "", device: str | torch.device = "cpu", **given: Any
    ) -> tuple["SAE", dict[str, Any], Float[Tensor, " d_sae"] | None]:
        """`from_pretrained` as a tuple: the SAE, its cfg as a dictionary, and `sparsity` (None if not published)."""
        sae = cls.from_pretrained(release, sae_id, device, **given)
        return sae, sae.cfg.to_dict(), sae.sparsity

    @classmethod
    def load_from_disk(
        cls,
        path: str | Path,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype | None = None,
        converter: Any = None,
        fold_W_dec_norm: bool = False,
    ) -> "SAE":
        """SAELens's name of `load`, for what lies on this machine. Raises `MechintError` if nothing is there."""
        from mechint.sae.load import load_path

        _no_converter(converter)
        device = usable(device)
        return _folded(load_path(path).to(device=device, dtype=dtype_of(dtype)), fold_W_dec_norm)

    load_from_pretrained = load_from_disk

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any]) -> "SAE":
        """A new SAE from a cfg as a dictionary: `SAE(SAEConfig.from_dict(...))`."""
        return SAE(SAEConfig.from_dict(config_dict))  # pyright: ignore[reportAbstractUsage]  (its `__new__`)

    def save_model(self, path: str | Path, sparsity: Float[Tensor, " d_sae"] | None = None) -> tuple[Path, Path]:
        """Write `cfg.json` and `sae_weights.safetensors` into the folder `path` (`sparsity.safetensors` too, if it is
        known), replacing those that are there. Returns the paths of weights and cfg.

        Raises:
            MechintError: SAELens's files cannot hold what this SAE computes; the message says why.
        """
        from mechint.sae.load import save_folder

        return save_folder(self, path, self.sparsity if sparsity is None else sparsity)

    save_inference_model = save_model

    @classmethod
    def from_tensors(
        cls,
        architecture: str,
        tensors: Mapping[str, Any],
        source: str | Path = "the SAE",
        *,
        metadata: Mapping[str, Any] | None = None,
        notes: tuple[str, ...] = (),
        sparsity: Float[Tensor, " d_sae"] | None = None,
        transcoder: bool = False,
        **settings: Any,
    ) -> "SAE":
        """The SAE whose weights these are; every reader of files ends here.

        Args:
            architecture: standard, topk, jumprelu, gated, ... A transcoder's is that of its activation function.
            tensors: by our names and in our orientation; float32 is made of them.
            source: names them in errors.
            transcoder: whether another activation than the input is reconstructed; `W_skip` may be among the tensors.
            settings: options of the architecture (`k`), and settings of `SAEConfig`.

        Raises:
            MechintError: a tensor that is missing, one too many, of the wrong shape or not finite; an unusable option.
        """
        kind = find_architecture(architecture)
        if not kind.saved_tensors:
            raise MechintError(f"{source}: {architecture} is a form for training; what is saved of it is another one")
        d_in, d_sae, d_out = widths_of(tensors, source)
        skip = transcoder and "W_skip" in tensors
        metadata = SAEMetadata(metadata or {})
        given = {name: value for name, value in settings.items() if name in (*kind.options, *kind.departures)}
        rest = {name: value for name, value in settings.items() if name not in given}
        if "k" in kind.saved_tensors and (isinstance(k := given.get("k"), bool) or not isinstance(k, (int, float))):
            raise MechintError(f"{source}: {architecture} needs k, the number of active latents; found {k!r}")
        for name in rest.keys() - SETTINGS:
            raise MechintError(f"{source}: {architecture} has no setting {name!r}; {nearest(name, SETTINGS)}")
        cfg = SAEConfig(
            d_in,
            d_sae,
            Architecture.of_transcoder(architecture, skip=skip) if transcoder else architecture,
            d_out=d_out if transcoder else None,
            k=given.pop("k", None),
            reshape_activations=reshape_activations(metadata),
            options=given,
            metadata=metadata,
            **rest,
        )
        try:
            with torch.device("meta"):  # shapes only: the values follow
                sae = kind(cfg)
        except MechintError as error:
            raise MechintError(f"{source}: {error}") from None
        sae.load_state_dict(fitting(sae, str(sae.cfg.architecture), tensors, source), assign=True)
        sae.cfg.device, sae.notes = "cpu", notes
        sae.sparsity = sparsity
        return sae.requires_grad_(True)

    def variant(
        self, tensors: Mapping[str, Tensor] | None = None, architecture: str | None = None, **changes: Any
    ) -> "SAE":
        """An SAE with other tensors or settings; what is not named stays. A rescaled or reordered dictionary, say."""
        cfg = self.cfg
        settings: dict[str, Any] = {name: getattr(cfg, name) for name in SETTINGS}
        if architecture in (None, self.architecture):
            settings |= {name: getattr(self, name) for name in (*self.options, *self.departures)}
        said = {"notes": self.notes, "sparsity": self.sparsity}
        given = {**settings, **said, "transcoder": self.is_transcoder, **changes}
        return SAE.from_tensors(architecture or self.architecture, tensors or self.weights(), **given)

    def weights(self) -> dict[str, Float[Tensor, "..."]]:
        """The parameters by name, contiguous float32 on the CPU: what files are made of. Copies only where needed."""
        return {name: value.detach().to("cpu", torch.float32).contiguous() for name, value in self.named_parameters()}

    def tensors(self) -> dict[str, Tensor]:
        """What checkpoint.pt holds: the weights, and options that change what they compute."""
        numbers = {**self.saved_options(), **self.departing()}
        return self.weights() | {name: torch.tensor(value) for name, value in numbers.items()}

    def saved_options(self) -> dict[str, Any]:
        """Options that a file holds, since they change what the trained SAE computes: `k` of topk."""
        return {name: getattr(self, name) for name in self.saved_tensors if name in self.options}

    def departing(self) -> dict[str, Any]:
        """Those `departures` whose value here is not the usual one."""
        return {name: getattr(self, name) for name, usual in self.departures.items() if getattr(self, name) != usual}

    # --- what it computes ---------------------------------------------------------------------------------------------

    def encode(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_sae"]:
        """Activations to `feature_acts`, as the trained SAE computes them."""
        pre = self.hook_sae_acts_pre(self.pre_activations(x))
        return self.hook_sae_acts_post(self.activate(pre))

    def pre_activations(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_sae"]:
        """`process_sae_in(x) @ W_enc + b_enc`."""
        return self.process_sae_in(x) @ self.W_enc + self.b_enc

    @abstractmethod
    def activate(self, pre: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        """`feature_acts` from the pre-activations."""

    def process_sae_in(self, x: Float[Tensor, "..."]) -> Float[Tensor, "... d_in"]:
        """What the encoder's weights are multiplied with: heads side by side, scaled, normalised, without `b_dec`."""
        x = self._side_by_side(x).to(self.W_enc.dtype)
        if x.shape[-1] != self.d_in:
            raise MechintError(
                f"the SAE has d_in {self.d_in}, but was given vectors of width {x.shape[-1]}, shape {list(x.shape)}"
            )
        x = self.hook_sae_input(x)
        u = self._normalised(x if self.cfg.input_scale == 1.0 else x * self.cfg.input_scale)
        return u - self.peers.shared(self.b_dec) if self.cfg.apply_b_dec_to_input else u

    def decode(self, feature_acts: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_out"]:
        """`feature_acts` to reconstructed activations. Where inputs are normalised one by one, what was done to the
        last `encode`'s is undone. A skip connection is not part of it."""
        out = self.hook_sae_recons(self.peers.sum_latents(feature_acts @ self.W_dec) + self.b_dec)
        if self.cfg.normalize_activations != "none":
            if self._undo is None or self._undo[0].shape[:-1] != out.shape[:-1]:
                raise MechintError(
                    f"this SAE normalises each input ({self.cfg.normalize_activations}): encode the same batch first,"
                    " so that decode knows what to undo"
                )
            out = out * self._undo[0] + self._undo[1]
        return out if self.cfg.input_scale == 1.0 else out / self.cfg.input_scale

    def output_scale(self) -> Float[Tensor, "*batch 1"] | float:
        """What `decode` multiplies `feature_acts @ W_dec` by for the batch that was encoded last: 1 for most SAEs."""
        undone = 1.0 if self._undo is None else self._undo[0]
        return undone / self.cfg.input_scale

    def run(
        self, x: Float[Tensor, "*batch d_in"]
    ) -> tuple[Float[Tensor, "*batch d_out"], Float[Tensor, "*batch d_sae"]]:
        """`(x_hat, feature_acts)`; a skip connection is part of `x_hat`."""
        feature_acts = self.encode(x)
        return self._with_skip(x, self.decode(feature_acts)), feature_acts

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """The reconstruction of `x`, in its shape; a transcoder's output, its skip connection included."""
        whole = self._side_by_side(x)
        out = self.replacement(whole, use_error_term=self.use_error_term and not self.is_transcoder)
        return out.reshape(x.shape) if whole is not x else out

    def replacement(
        self,
        x: Float[Tensor, "*batch d_in"],
        target: Float[Tensor, "*batch d_out"] | None = None,
        *,
        use_error_term: bool = False,
        passed: Bool[Tensor, "*batch 1"] | None = None,
    ) -> Float[Tensor, "*batch d_out"]:
        """What a model's hook holds in place of `target` (`x` if not given; a transcoder's is another activation).

        Args:
            use_error_term: add what is missed of `target`, so that the result is `target` unless functions at the hook
                points change something on the way.
            passed: where the SAE is passed by, and `target` stays.
        """
        target = x if target is None else target
        out, _ = self.run(x)
        if use_error_term:
            with torch.no_grad(), self.without_hooks():
                error = target - self.run(x)[0]
                error = error if passed is None else torch.where(passed, torch.zeros_like(error), error)
            out = out + self.hook_sae_error(error)
        return self.hook_sae_output(out if passed is None else torch.where(passed, target, out))

    def _with_skip(self, x: Tensor, out: Tensor) -> Tensor:
        return out + x.to(out.dtype) @ self.W_skip.T if self.cfg.has_skip else out

    def _normalised(self, x: Tensor) -> Tensor:
        if self.cfg.normalize_activations == "constant_norm_rescale":
            norm = x.norm(dim=-1, keepdim=True).clamp_min(1e-12) / self.d_in**0.5
            self._undo = norm.detach(), torch.zeros_like(norm)
            return x / norm
        if self.cfg.normalize_activations == "layer_norm":
            mean = x.mean(dim=-1, keepdim=True)
            std = (x - mean).std(dim=-1, keepdim=True)
            self._undo = std.detach(), mean.detach()
            return (x - mean) / (std + LAYER_NORM_EPS)
        return x

    # --- heads --------------------------------------------------------------------------------------------------------

    @property
    def hook_z_reshaping_mode(self) -> bool:
        """Whether heads that come one by one, `[..., head, d_head]`, are laid side by side."""
        return self.cfg.reshape_activations == "hook_z" if self._reshaping is None else self._reshaping

    def turn_on_forward_pass_hook_z_reshaping(self) -> None:
        if not str(self.hook_in).endswith("_z"):
            raise MechintError(f"heads are laid side by side for an SAE of hook_z; this one is of {self.hook_in}")
        self._reshaping = True

    def turn_off_forward_pass_hook_z_reshaping(self) -> None:
        self._reshaping = False

    def _side_by_side(self, x: Tensor) -> Tensor:
        heads = self.hook_z_reshaping_mode and x.ndim > 2 and x.shape[-1] != self.d_in
        return x.flatten(-2) if heads and x.shape[-2] * x.shape[-1] == self.d_in else x

    # --- training -----------------------------------------------------------------------------------------------------

    @abstractmethod
    def loss(self, x: Float[Tensor, "batch d_in"], objective: Objective) -> Loss:
        """The terms that training minimises on a batch, differentiable."""

    @property
    def looks_across_rows(self) -> bool:
        """Whether the loss of a row depends on the batch's other rows, so that processes that share one ask `peers`."""
        return False

    @property
    def wants_dead(self) -> bool:
        """Whether its own loss has a term over dead latents, so that `Objective.dead` has to name them."""
        return False

    def step_widths(self, seed: int, step: int) -> tuple[int, ...] | None:
        """`Objective.widths` of a step, a function of (seed, step); None where nothing is drawn."""
        return None

    @staticmethod
    def latent_dim(name: str, tensor: Tensor) -> int | None:
        """The dimension of a parameter or buffer that counts latents; None for what all latents share."""
        if name in ("b_dec", "W_skip") or tensor.ndim == 0:
            return None
        return 1 if name == "W_enc" else 0

    def only(self, latents: slice) -> "SAE":
        """The SAE of these latents alone, over the same memory; to encode with, where `latents_are_independent`."""
        part = copy.copy(self)
        part._parameters = {}
        for name, parameter in self._parameters.items():
            if parameter is not None:
                dim = self.latent_dim(name, parameter)
                own = parameter if dim is None else parameter[:, latents] if dim else parameter[latents]
                part._parameters[name] = own  # type: ignore[assignment]
        part.cfg = dataclasses.replace(self.cfg, d_sae=len(range(self.d_sae)[latents]))
        return part

    def penalty_scale(self) -> Float[Tensor, " d_sae"] | None:
        """Norms of the decoder rows where they are free, None where they are all 1."""
        return None if self.unit_decoder else self.W_dec.norm(dim=1)

    @torch.no_grad()
    def constrain(self) -> None:
        """What holds after every step: decoder rows of unit norm. Architectures with more constraints extend it."""
        if self.unit_decoder:
            self.renormalize_decoder()

    @torch.no_grad()
    def renormalize_decoder(self) -> None:
        """Divide each row of `W_dec` by its norm, in place."""
        self.W_dec.div_(self.decoder_norms()[:, None])

    def decoder_norms(self) -> Float[Tensor, " d_sae"]:
        """Norms of the decoder rows, never below `MIN_DECODER_NORM`."""
        return self.W_dec.norm(dim=1).clamp_min(MIN_DECODER_NORM)

    def saved_form(self, input_scale: float = 1.0) -> "SAE":
        """A copy to save and apply: decoder rows of unit norm, for inputs that are not multiplied by `input_scale`.

        With f' = f / s, dividing every bias and threshold by s gives the SAE that does to x what this one does to s x:
        the weights stay as they are. With free decoder rows of norm n, f' = n f moves n into the encoder. Both change
        no reconstruction beyond rounding.
        """
        saved = self._inference_copy()
        with torch.no_grad():
            if not self.unit_decoder:
                saved._fold_norms()
                saved.unit_decoder = True
            if input_scale != 1.0:
                for name in ("b_dec", *saved.latent_offsets()):
                    saved.get_parameter(name).div_(input_scale)
        return saved

    def _inference_copy(self) -> "SAE":
        """A copy in the architecture that is saved; another class where training and saved form differ."""
        return copy.deepcopy(self)

    def _fold_norms(self) -> None:
        norms = self.decoder_norms()
        self.W_enc.mul_(norms)
        self.W_dec.div_(norms[:, None])
        for name in self.latent_offsets():
            self.get_parameter(name).mul_(norms)

    @torch.no_grad()
    def fold_W_dec_norm(self) -> None:
        """Decoder rows of unit norm, their norms moved into the encoder, in place; reconstructions stay as they are.

        Raises:
            MechintError: a top-k that does not weigh by norm, which would choose other latents.
        """
        if self.architecture == "topk" and not self.cfg.rescale_acts_by_decoder_norm:
            raise MechintError("fold_W_dec_norm would change which latents this topk SAE chooses: leave its norms")
        self._fold_norms()

    @classmethod
    def latent_offsets(cls) -> tuple[str, ...]:
        """Parameters `[d_sae]` in units of the pre-activations, the encoder's bias first: they scale with the input."""
        return tuple(cls.latent_vectors)

    # --- small things that code relies on -----------------------------------------------------------------------------

    @property
    def d_in(self) -> int:
        return self.cfg.d_in

    @property
    def d_sae(self) -> int:
        return self.cfg.d_sae

    @property
    def d_out(self) -> int:
        """The width of what it writes: `d_in`, but for transcoders."""
        return self.cfg.d_out or self.cfg.d_in

    @property
    def is_plain(self) -> bool:
        """Whether nothing is done to inputs but that `b_dec` is subtracted, so that `W_enc` and the biases say all."""
        cfg = self.cfg
        as_given = cfg.normalize_activations == "none" and cfg.input_scale == 1.0
        return as_given and cfg.apply_b_dec_to_input and not cfg.rescale_acts_by_decoder_norm

    @property
    def is_transcoder(self) -> bool:
        """Whether it reads one hook and writes another."""
        return self.cfg.is_transcoder

    @property
    def metadata(self) -> dict[str, Any]:
        """What it was trained on, by name; what is not there is not known."""
        return self.cfg.metadata

    @metadata.setter
    def metadata(self, values: Mapping[str, Any]) -> None:
        self.cfg.metadata = SAEMetadata(values)
        self.cfg.reshape_activations = reshape_activations(self.cfg.metadata)

    @property
    def hook_in(self) -> str | None:
        """The hook that it encodes, if that is known."""
        return self.metadata.get("hook_name")

    @property
    def hook_out(self) -> str | None:
        """The hook whose value it reconstructs, if that is known: `hook_in`, but for transcoders."""
        return self.metadata.get("hook_name_out") if self.is_transcoder else self.hook_in

    @property
    def device(self) -> torch.device:
        return self.W_dec.device

    @property
    def dtype(self) -> torch.dtype:
        return self.W_dec.dtype

    @property
    def num_params(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def get_name(self) -> str:
        """`sae_<model>_<hook>_<d_sae>`."""
        return f"sae_{self.cfg.model_name}_{self.cfg.hook_name}_{self.d_sae}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SAE":
        super()._apply(fn, recurse)
        self.cfg.device, self.cfg.dtype = str(self.device), str(self.dtype).removeprefix("torch.")
        return self

    def __getattr__(self, name: str) -> Any:
        if name in ELSEWHERE:
            raise ElsewhereError(f"SAELens's {name} is not here; what does the same: {ELSEWHERE[name]}")
        return super().__getattr__(name)

    def __iter__(self) -> Iterator[Any]:
        """As the triple of SAELens before 6: `(sae, cfg as a dictionary, sparsity)`."""
        return iter((self, self.cfg.to_dict(), self.sparsity))

    def __getitem__(self, index: int) -> Any:
        return tuple(self)[index]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # checkpoint.pt files call the decoder bias b_pre.
        if prefix + "b_pre" in state_dict:
            state_dict[prefix + "b_dec"] = state_dict.pop(prefix + "b_pre")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"  # without the hook points, which are always the same

    def extra_repr(self) -> str:
        own = "".join(f", {name}={getattr(self, name)}" for name in (*self.options, *self.departing()))
        where = "" if self.hook_in is None else f", hook_name={self.hook_in}"
        return f"{self.cfg.architecture}, d_in={self.d_in}, d_sae={self.d_sae}{own}{where}"


def _folded(sae: SAE, fold: bool) -> SAE:
    if fold:
        sae.fold_W_dec_norm()
    return sae


def _no_converter(converter: Any) -> None:
    if converter is not None:
        raise MechintError(
            f"converter={getattr(converter, '__name__', converter)!r} is not taken: formats are recognised, see"
            " docs/formats.md; leave it out"
        )


def as_sae(sae: Any) -> SAE:
    """`sae` itself. Raises `MechintError` where it is no SAE of this package."""
    if isinstance(sae, SAE):
        return sae
    raise MechintError(f"expected an SAE (mechint.SAE), got {type(sae).__name__}; SAE.load opens files and names")


def usable(device: str | torch.device | None) -> str:
    """The device, cpu for None. Raises `MechintError` if this machine has none such."""
    try:
        return detect_device(str(device or "cpu"))
    except MechintError as error:
        raise MechintError(str(error).replace("--device cpu", 'device="cpu"')) from None


def build_sae(
    architecture: str,
    d_in: int,
    d_sae: int,
    *,
    generator: torch.Generator | None = None,
    options: Mapping[str, Any] | None = None,
) -> SAE:
    """A new SAE by the name of its architecture. Raises `MechintError` for unknown names and options."""
    cls = find_architecture(architecture)
    for name in options or {}:
        if name not in cls.options:
            having = [other for other, kind in ARCHITECTURES.items() if name in kind.options]
            raise MechintError(
                f"--{name.replace('_', '-')} does not apply to architecture {architecture!r}"
                + (f", only to {', '.join(having)}" if having else "")
            )
    return cls(d_in, d_sae, generator=generator, **(options or {}))


def find_architecture(name: str) -> type[SAE]:
    """The class of an architecture. Raises `MechintError` with the nearest name for an unknown one."""
    if name not in ARCHITECTURES:
        raise MechintError(f"unknown architecture {name!r}; {nearest(name, ARCHITECTURES)}")
    return ARCHITECTURES[name]
