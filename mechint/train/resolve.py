"""From what was asked to what will be done: settings that the activations record, checked and filled in."""

from typing import Any

from mechint.config import SAETrainConfig, layer_of_hook
from mechint.data.batches import split_indices
from mechint.data.store import Activations
from mechint.errors import MechintError
from mechint.provenance import detect_device


def resolve(config: SAETrainConfig, activations: Activations) -> SAETrainConfig:
    """The config with what the activations record filled in; a contradiction between the two is a `MechintError`."""
    info, default = activations.info, SAETrainConfig()
    if activations.d_in != config.activation_dim:
        raise MechintError(
            f"{config.activations_path} holds vectors of width {activations.d_in}, but --activation-dim is"
            f" {config.activation_dim}: pass --activation-dim {activations.d_in}, or other activations"
        )
    filled: dict[str, Any] = {"device": detect_device(config.device)}
    if config.precision == "tf32" and not filled["device"].startswith("cuda"):
        raise MechintError(f"--precision tf32 needs --device cuda, not {filled['device']}: use float32 or bf16")
    for key in ("hook_name", "model_name", "model_source", "dataset_name", "dataset_split", "num_texts", "max_chars"):
        recorded = info.get("n_texts" if key == "num_texts" else key)
        if recorded is None:
            continue
        given = getattr(config, key)
        if key in ("hook_name", "model_name") and given not in (recorded, getattr(default, key)):
            flag = "--hook-name" if key == "hook_name" else "--model-name"
            raise MechintError(
                f"{config.activations_path} was collected with {key} {recorded!r}, but {flag} is {given!r}: leave the"
                " flag out, or collect other activations"
            )
        filled[key] = recorded
    hook_name = filled.get("hook_name", config.hook_name)
    filled["layer"] = layer if (layer := layer_of_hook(hook_name)) is not None else config.layer
    if config.split_by == "text" and activations.text_ids is None:
        filled["split_by"] = "row"  # an old .pt does not know its texts; the config that is written says what was done
    return config.with_overrides(**filled)


def split(config: SAETrainConfig, activations: Activations) -> tuple[Any, Any]:
    """`(train, held-out)` row indices. Raises `MechintError` if a batch is larger than what there is to train on."""
    splits = split_indices(activations, config.val_fraction, config.seed, config.split_by)
    if config.batch_size > len(splits[0]):
        raise MechintError(
            f"--batch-size {config.batch_size} is more than the {len(splits[0])} rows there are to train on: lower it,"
            " or collect more texts"
        )
    return splits
