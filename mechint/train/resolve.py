"""From what was asked to what will be done: settings that the activations record, checked and filled in."""

from typing import Any

import torch

from mechint.config import SAETrainConfig, layer_of_hook, said
from mechint.data.batches import split_as
from mechint.data.store import Activations
from mechint.errors import MechintError, nearest
from mechint.kernels.choose import KERNELS
from mechint.provenance import detect_device
from mechint.sae import build_sae

# What is recorded of where the activations are from. Nothing here changes how an SAE is trained.
RECORDED = (
    *("model_name", "model_source", "hook_name", "processing", "prepend_bos"),
    *("dataset_name", "dataset_split", "num_texts", "max_chars"),
)


def resolve(config: SAETrainConfig, activations: Activations) -> SAETrainConfig:
    """The config with what the activations record filled in; a contradiction between the two is a `MechintError`.

    What neither of them says is None.
    """
    if activations.d_in != config.activation_dim:
        raise MechintError(
            f"{config.activations_path} holds vectors of width {activations.d_in}, but --activation-dim is"
            f" {config.activation_dim}: pass --activation-dim {activations.d_in}, or other activations"
        )
    filled: dict[str, Any] = {"device": detect_device(config.device)}
    if config.precision == "tf32" and not filled["device"].startswith("cuda"):
        raise MechintError(f"--precision tf32 needs --device cuda, not {filled['device']}: use float32 or bf16")
    for key in RECORDED:
        recorded = activations.info.get("n_texts" if key == "num_texts" else key)
        if recorded is not None:
            _check_same(config, key, recorded, activations)
            filled[key] = recorded
    if config.split_by == "text" and activations.text_ids is None:
        filled["split_by"] = "row"  # an old .pt does not know its texts; the config that is written says what was done
    config = config.with_latents(config.num_features).with_learning_rate()
    return without_unsaid(SAETrainConfig.from_dict({**config.to_dict(), **filled}))


def without_unsaid(config: SAETrainConfig) -> SAETrainConfig:
    """The config with None for what nobody said of the activations; the layer is the hook's."""
    known: dict[str, Any] = {key: said(getattr(config, key)) for key in (*RECORDED, "layer")}
    if known["hook_name"] is not None:
        known["layer"] = layer_of_hook(known["hook_name"])
    return SAETrainConfig.from_dict({**config.to_dict(), **known})


def _check_same(config: SAETrainConfig, key: str, recorded: Any, activations: Activations) -> None:
    """Raise `MechintError` if the config says something else than the activations' own record."""
    given = said(getattr(config, key))
    if key == "model_name" and given == activations.info.get("model_source"):
        return  # pythia-70m by its full name
    # that many texts were asked for, and there may have been fewer
    if given is None or given == recorded or key == "num_texts":
        return
    flag = f"--{key.replace('_', '-')}"
    raise MechintError(
        f"{config.activations_path} was collected with {key} {recorded!r}, but {flag} (or {key} in --config) says"
        f" {given!r}: leave it out, or collect other activations"
    )


def split(config: SAETrainConfig, activations: Activations) -> tuple[Any, Any]:
    """`(train, held-out)` row indices. Raises `MechintError` if a batch is larger than what there is to train on."""
    splits = split_as(config, activations)
    if config.live is None and config.batch_size > len(splits[0]):
        raise MechintError(
            f"--batch-size {config.batch_size} is more than the {len(splits[0])} rows there are to train on: lower it,"
            " or collect more texts"
        )
    return splits


def check_architecture(config: SAETrainConfig) -> None:
    """Raise `MechintError` for what the architecture or the kernels refuse, before a directory is made."""
    if config.kernel not in KERNELS:
        raise MechintError(f"unknown --kernel {config.kernel!r}; {nearest(config.kernel, KERNELS)}")
    with torch.device("meta"):
        sae = build_sae(
            config.architecture, config.activation_dim, config.num_features, options=config.architecture_options
        )
    if config.target_l0 is None or not config.steers_l0:
        return
    if not sae.has_penalty:
        raise MechintError(
            f"--target-l0 steers the weight of a penalty, and {config.architecture} has none: --k"
            f" {config.target_l0:g} is its L0"
        )
    if config.target_l0 > config.num_features:
        raise MechintError(f"--target-l0 {config.target_l0:g} is more than the {config.num_features} latents there are")
    if config.l1_lambda == 0:
        raise MechintError("--target-l0 steers the weight that --lam starts at, which must be above 0")
