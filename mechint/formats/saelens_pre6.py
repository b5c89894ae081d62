"""SAELens before 6, and the community's files that follow it: cfg.json with everything at the top.

It has ReLU, topk (`activation_fn_kwargs.k`), jumprelu and gated; no transcoders. Reading is shared with `saelens`.
"""

from pathlib import Path
from typing import Any

from mechint.formats import saelens
from mechint.formats.base import Format
from mechint.formats.limits import refuse
from mechint.sae.base import SAE


def sniff(path: Path) -> bool:
    cfg = saelens.peek_cfg(path)
    return cfg is not None and saelens.is_pre_6(cfg)


def holds(sae: SAE) -> str | None:
    if sae.is_transcoder:
        return "a transcoder"
    if sae.cfg.rescale_acts_by_decoder_norm:
        return "a top-k that weighs latents by their decoder norms"
    return saelens.holds(sae)


def write(sae: SAE, path: Path) -> None:
    from mechint.config import layer_of_hook  # with it come the settings of all commands: not to open an SAE

    refuse(FORMAT, sae)
    said = {name: value for name, value in sae.metadata.items() if name not in saelens.OUR_MARKS}
    hook = said.get("hook_name")
    topk = sae.architecture == "topk"
    cfg: dict[str, Any] = {
        **saelens.common_cfg(sae),
        "architecture": "standard" if topk else sae.architecture,
        "activation_fn_str": "topk" if topk else "relu",
        "activation_fn_kwargs": {"k": sae.k} if topk else {},
        "finetuning_scaling_factor": False,
        "sae_lens_training_version": None,
        "model_name": said.get("model_name"),
        "hook_name": hook,
        "hook_layer": said.get("hook_layer", layer_of_hook(hook) if isinstance(hook, str) else None),
        "hook_head_index": said.get("hook_head_index"),
        "prepend_bos": said.get("prepend_bos", True),
        "context_size": said.get("context_size"),
        "dataset_path": said.get("dataset_path"),
        "dataset_trust_remote_code": False,
        "model_from_pretrained_kwargs": said.get("model_from_pretrained_kwargs", {}),
        "neuronpedia_id": said.get("neuronpedia_id"),
        # what the old keys have no place for; SAELens does not look here before 6
        "metadata": said,
    }
    saelens.write_folder(sae, cfg, path)


FORMAT = Format(
    name="saelens_pre6",
    title="SAELens before 6 (also what the community writes as its layout)",
    marks="cfg.json that names no sae_lens_version of 6 or above, and sae_weights.safetensors",
    sniff=sniff,
    read=saelens.read,
    write=write,
    holds=holds,
)
