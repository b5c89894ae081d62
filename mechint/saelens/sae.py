"""`SAE` as SAELens has it: `sae(x)` is the reconstruction, `cfg` says what it is, weights stay as their file has them.

The mathematics are those of `mechint.formats.base.Loaded`, in the SAE's own precision and on its device. A bias that is
not subtracted from the input, a constant input scale or an input normalisation are settings here, not folded away, so
that `W_enc` and `b_enc` are the numbers that SAELens shows for the same file. `to_mechint()` folds.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mechint.errors import MechintError, nearest
from mechint.formats import Loaded, from_sae, to_sae
from mechint.formats.base import LAYER_NORM_EPS, checked
from mechint.formats.convert import find_format, held_variant, load
from mechint.provenance import make_dir, scratch_folder
from mechint.sae import SAE as MechintSAE
from mechint.saelens.form import config_of, drawn, dtype_of, usable
from mechint.saelens.releases import fetch, find_release, with_norm_factor
from mechint.saelens.sae_config import SAEConfig

HOOKS = (
    "hook_sae_input",
    "hook_sae_acts_pre",
    "hook_sae_acts_post",
    "hook_sae_recons",
    "hook_sae_error",
    "hook_sae_output",
)
WEIGHTS_FILE, CFG_FILE, SPARSITY_FILE = "sae_weights.safetensors", "cfg.json", "sparsity.safetensors"

At = Callable[[str, Tensor], Tensor]


def _as_it_is(name: str, value: Tensor) -> Tensor:
    return value


@final
class SAE(nn.Module):
    """A sparse autoencoder to use: `encode`, `decode`, and a call that does both.

    Make one with `from_pretrained`, `load_from_disk`, or `SAE(SAEConfig(...))` for a new one with drawn weights.

    Attributes:
        W_enc: `[d_in, d_sae]`.  W_dec: `[d_sae, d_in]`.  b_dec: `[d_in]`.
        b_enc: `[d_sae]`; gated SAEs have `b_gate`, `b_mag` and `r_mag` instead, JumpReLU ones a `threshold` too.
        W_skip: `[d_out, d_in]`, of transcoders with a skip connection. Of every transcoder `W_dec` and `b_dec` are
            `d_out` wide, since it writes another hook than it reads.
        cfg: an `SAEConfig`.
        sparsity: log10 of how often each latent fires, `[d_sae]`, if that is known.
    """

    W_enc: nn.Parameter
    W_dec: nn.Parameter
    b_dec: nn.Parameter
    b_enc: nn.Parameter  # these six: where the architecture has them
    b_gate: nn.Parameter
    b_mag: nn.Parameter
    r_mag: nn.Parameter
    threshold: nn.Parameter
    W_skip: nn.Parameter

    def __init__(self, source: SAEConfig | Loaded, *, sparsity: Float[Tensor, " d_sae"] | None = None):
        super().__init__()
        loaded = drawn(source) if isinstance(source, SAEConfig) else source
        self._form = replace(loaded, tensors={}, extras={})  # its settings; the tensors are the parameters below
        for name, tensor in loaded.tensors.items():
            self.register_parameter(name, nn.Parameter(tensor.clone()))
        self.cfg = config_of(loaded)
        self.sparsity = loaded.extras.get("sparsity") if sparsity is None else sparsity
        self.use_error_term = False
        # what was done to the last input, for a `decode` that is called on its own
        self._undo: tuple[Tensor, Tensor] | None = None
        if isinstance(source, SAEConfig):
            self.to(device=usable(source.device), dtype=dtype_of(source.dtype))

    # --- from and to files --------------------------------------------------------------------------------------------

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
        """Load an SAE from a release, from `user/repo` on the Hugging Face Hub, or from a local folder.

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
        _no_converter(converter)
        usable(device)  # known before anything is downloaded
        where = find_release(release, sae_id, registry)
        folder = where.folder if where.repo_id is None else fetch(where, force_download=force_download)
        with with_norm_factor(folder, where.norm_scaling_factor) as whole:
            return cls.load_from_disk(whole, device, dtype, None, fold_W_dec_norm, extra=where.metadata)

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
        extra: dict[str, Any] | None = None,
    ) -> "SAE":
        """Load a folder or file of any format that mechint reads: SAELens's layout, a run directory, ...

        Args:
            extra: entries of the metadata that the files do not say themselves.

        Raises:
            MechintError: nothing there, or files that are no SAE.
        """
        _no_converter(converter)
        path, dtype_given, device = Path(path), dtype_of(dtype), usable(device)
        if not path.exists():
            beside = [item.name for item in path.parent.iterdir()] if path.parent.is_dir() else []
            raise MechintError(f"no SAE at {path}" + (f"; {nearest(path.name, sorted(beside))}" if beside else ""))
        loaded = load(path)[1]
        if extra:
            loaded = replace(loaded, metadata={**loaded.metadata, **extra})
        sae = cls(loaded).to(device=device, dtype=dtype_given)
        if fold_W_dec_norm:
            sae.fold_W_dec_norm()
        return sae

    load_from_pretrained = load_from_disk

    @classmethod
    def from_mechint(cls, sae: MechintSAE) -> "SAE":
        """From an SAE of `mechint.sae`, in the form that it is saved in."""
        return cls(from_sae(sae)).to(device=sae.W_dec.device)

    def to_mechint(self) -> MechintSAE:
        """As an SAE of `mechint.sae`: settings folded into the weights. Raises `MechintError` for what cannot be."""
        return to_sae(self.loaded()).to(self.device)

    def loaded(self) -> Loaded:
        """Tensors and settings as a value, in float32 on the CPU."""
        tensors = {name: value.detach() for name, value in self.named_parameters()}
        known = {} if self.sparsity is None else {"sparsity": self.sparsity.detach().float().cpu().contiguous()}
        whole = replace(self._form, tensors=tensors, extras=known, metadata=dict(self.cfg.metadata))
        return checked(whole, "the SAE")

    def save_model(self, path: str | Path, sparsity: Float[Tensor, " d_sae"] | None = None) -> tuple[Path, Path]:
        """Write `cfg.json` and `sae_weights.safetensors` into the folder `path` (`sparsity.safetensors` too, if it is
        known), replacing those that are there. Returns the paths of weights and cfg.

        Raises:
            MechintError: SAELens's files cannot hold what this SAE computes; the message says why.
        """
        folder = Path(path)
        make_dir(folder)
        loaded = self.loaded()
        if sparsity is not None:
            loaded = replace(loaded, extras={"sparsity": sparsity.detach().float().cpu().contiguous()})
        with scratch_folder(folder / WEIGHTS_FILE) as scratch:
            made = scratch / "sae"
            target = find_format("saelens", to=True)
            assert target.write is not None
            target.write(held_variant(loaded, target)[0], made)
            # the cfg goes first and comes last: between, the folder is none of an SAE, and never one of two halves
            for name in (CFG_FILE, SPARSITY_FILE):
                (folder / name).unlink(missing_ok=True)
            for name in sorted((item.name for item in made.iterdir()), key=lambda name: (name == CFG_FILE, name)):
                os.replace(made / name, folder / name)
        return folder / WEIGHTS_FILE, folder / CFG_FILE

    save_inference_model = save_model  # in SAELens, of an SAE in training; trained ones are what is returned here

    # --- what it computes ---------------------------------------------------------------------------------------------

    def encode(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_sae"]:
        """Activations to `feature_acts`. Any leading shape; an SAE of all heads of a hook (`hook_z`) takes them one by
        one too, `[..., head, d_head]`."""
        return self.encode_with(x, _as_it_is)

    def decode(self, feature_acts: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_out"]:
        """`feature_acts` to reconstructed activations (`d_out` is `d_in`, but for transcoders). Where inputs are
        normalised one by one, what was done to the last `encode`'s is undone. A skip connection is not part of it."""
        return self.decode_with(feature_acts, _as_it_is)

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """The reconstruction of `x`, in its shape; a transcoder's output, its skip connection included."""
        if (whole := self._side_by_side(x)) is not x:
            return self.forward(whole).reshape(x.shape)
        return self.run_with(x, _as_it_is, use_error_term=self.use_error_term and not self.cfg.is_transcoder)

    def run_with(self, x: Tensor, at: At, *, use_error_term: bool = False, target: Tensor | None = None) -> Tensor:
        """Encode and decode with each of `HOOKS` passed through `at(name, value)`, whose result is used instead.

        With `use_error_term`, what is missed of `target` (`x` if not given; a transcoder needs it) is added again, so
        that the result is `target` unless `at` changes something on the way.
        """
        out = self._with_skip(x, self.decode_with(self.encode_with(x, at), at))
        if use_error_term:
            with torch.no_grad():
                error = (x if target is None else target) - self._with_skip(x, self.decode(self.encode(x)))
            out = out + at("hook_sae_error", error)
        return at("hook_sae_output", out)

    def _with_skip(self, x: Tensor, out: Tensor) -> Tensor:
        return out + x.to(self.dtype) @ self.W_skip.T if "W_skip" in self._parameters else out

    def encode_with(self, x: Tensor, at: At) -> Tensor:
        """`encode` with its hooks passed through `at`."""
        form, x = self._form, self._side_by_side(x)
        if x.shape[-1] != self.cfg.d_in:
            raise MechintError(
                f"the SAE has d_in {self.cfg.d_in}, but was given vectors of width {x.shape[-1]}, shape {list(x.shape)}"
            )
        x = at("hook_sae_input", x.to(self.dtype))
        u = self._normalised(x if form.scale == 1.0 else x * form.scale)
        if form.apply_b_dec_to_input:
            u = u - self.b_dec
        if form.architecture == "gated":
            v = u @ self.W_enc
            pre = at("hook_sae_acts_pre", v * self.r_mag.exp() + self.b_mag)
            return at("hook_sae_acts_post", (v + self.b_gate > 0) * pre.relu())
        pre = at("hook_sae_acts_pre", u @ self.W_enc + self.b_enc)
        if form.architecture == "topk":
            acts = self._top(pre * self._norms() if form.rescale_acts_by_decoder_norm else pre)
        elif form.architecture == "jumprelu":
            acts = pre.relu() * (pre > self.threshold)
        else:
            acts = pre.relu()
        return at("hook_sae_acts_post", acts)

    def decode_with(self, feature_acts: Tensor, at: At) -> Tensor:
        """`decode` with its hook passed through `at`."""
        if self._form.rescale_acts_by_decoder_norm:
            feature_acts = feature_acts / self._norms()
        out = at("hook_sae_recons", feature_acts @ self.W_dec + self.b_dec)
        if self._form.normalize != "none":
            if self._undo is None or self._undo[0].shape[:-1] != out.shape[:-1]:
                raise MechintError(
                    f"this SAE normalises each input ({self.cfg.normalize_activations}): encode the same batch first,"
                    " so that decode knows what to undo"
                )
            out = out * self._undo[0] + self._undo[1]
        return out if self._form.scale == 1.0 else out / self._form.scale

    def _side_by_side(self, x: Tensor) -> Tensor:
        """Heads that come one by one, where the SAE is one of all heads."""
        heads = self.cfg.reshape_activations == "hook_z" and x.ndim > 2 and x.shape[-1] != self.cfg.d_in
        return x.flatten(-2) if heads and x.shape[-2] * x.shape[-1] == self.cfg.d_in else x

    def _normalised(self, x: Tensor) -> Tensor:
        if self._form.normalize == "sqrt_d":
            norm = x.norm(dim=-1, keepdim=True).clamp_min(1e-12) / self.cfg.d_in**0.5
            self._undo = norm.detach(), torch.zeros_like(norm)
            return x / norm
        if self._form.normalize == "layer_norm":
            mean = x.mean(dim=-1, keepdim=True)
            std = (x - mean).std(dim=-1, keepdim=True)
            self._undo = std.detach(), mean.detach()
            return (x - mean) / (std + LAYER_NORM_EPS)
        return x

    def _top(self, pre: Tensor) -> Tensor:
        top = pre.topk(self._form.options["k"], dim=-1)
        kept = top.values.relu() if self._form.topk_relu else top.values
        return torch.zeros_like(pre).scatter(-1, top.indices, kept)

    def _norms(self) -> Float[Tensor, " d_sae"]:
        return self.W_dec.norm(dim=1).clamp_min(1e-8)

    @torch.no_grad()
    def fold_W_dec_norm(self) -> None:
        """Decoder rows of unit norm, their norms moved into the encoder; reconstructions stay as they are.

        Raises:
            MechintError: a top-k that does not weigh by norm, which would choose other latents.
        """
        if self._form.architecture == "topk" and not self._form.rescale_acts_by_decoder_norm:
            raise MechintError("fold_W_dec_norm would change which latents this topk SAE chooses: leave its norms")
        norms = self._norms()
        self.W_dec.div_(norms[:, None])
        self.W_enc.mul_(norms)
        for name in ("b_enc", "b_gate", "b_mag", "threshold"):
            if name in self._parameters:
                self.get_parameter(name).mul_(norms)

    # --- small things that code relies on -----------------------------------------------------------------------------

    @property
    def metadata(self) -> Any:
        return self.cfg.metadata

    @property
    def d_in(self) -> int:
        return self.cfg.d_in

    @property
    def hook_in(self) -> str | None:
        return self.cfg.metadata.get("hook_name")

    @property
    def hook_out(self) -> str | None:
        return self.cfg.metadata.get("hook_name_out") if self.is_transcoder else self.hook_in

    @property
    def is_transcoder(self) -> bool:
        return self.cfg.is_transcoder

    @property
    def d_out(self) -> int:
        """The width of what it writes: `d_in`, but for transcoders."""
        return self.W_dec.shape[1]

    @property
    def device(self) -> torch.device:
        return self.W_dec.device

    @property
    def dtype(self) -> torch.dtype:
        return self.W_dec.dtype

    def get_name(self) -> str:
        """`sae_<model>_<hook>_<d_sae>`."""
        return f"sae_{self.cfg.model_name}_{self.cfg.hook_name}_{self.cfg.d_sae}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SAE":
        super()._apply(fn, recurse)
        self.cfg.device, self.cfg.dtype = str(self.device), str(self.dtype).removeprefix("torch.")
        return self

    def _triple(self) -> tuple["SAE", dict[str, Any], Tensor | None]:
        return self, self.cfg.to_dict(), self.sparsity

    def __iter__(self) -> Iterator[Any]:
        return iter(self._triple())

    def __getitem__(self, index: int) -> Any:
        return self._triple()[index]

    def extra_repr(self) -> str:
        return f"{self.cfg.architecture}, d_in={self.cfg.d_in}, d_sae={self.cfg.d_sae}, hook_name={self.cfg.hook_name}"


def as_sae(sae: Any) -> SAE:
    """An `SAE` of this module, from itself or from one of `mechint.sae`. Raises `MechintError` for anything else."""
    if isinstance(sae, SAE):
        return sae
    if isinstance(sae, MechintSAE):
        return SAE.from_mechint(sae)
    raise MechintError(f"expected an SAE (mechint.SAE or one of mechint.sae), got {type(sae).__name__}")


def _no_converter(converter: Any) -> None:
    if converter is not None:
        raise MechintError(
            f"converter={getattr(converter, '__name__', converter)!r} is not taken: formats are recognised, see"
            " docs/formats.md; leave it out"
        )
