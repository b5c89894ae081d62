"""Names of SAELens's class that ours does not have, and what does the same. docs/saelens.md lists them too."""

from mechint.errors import MechintError

# In SAELens, and not here: what does the same.
ELSEWHERE = {
    "fold_activation_norm_scaling_factor": "a constant input scale is sae.cfg.input_scale; mechint.formats.fold_scale",
    "fold_activation_whitening": "nothing: SAEs of whitened inputs do not open here",
    "get_W_dec_norm": "sae.W_dec.norm(dim=-1)",
    "fold_and_get_W_dec_norm": "sae.decoder_norms(), then sae.fold_W_dec_norm()",
    "activation_dtype": "sae.dtype",
    "d_head": "the last width of the values that are given one head at a time",
    "mod_dict": "sae.hook_dict",
    "context_level": "nothing: hooks of sae.hooks(...) end with its block",
    "is_caching": "sae.run_with_cache(x)",
    "add_caching_hooks": "sae.run_with_cache(x)",
    "get_caching_hooks": "sae.run_with_cache(x)",
    "cache_all": "sae.run_with_cache(x)",
    "cache_some": "sae.run_with_cache(x, names_filter=...)",
    "add_perma_hook": "sae.add_hook(name, fn, is_permanent=True)",
    "check_and_add_hook": "sae.add_hook(name, fn)",
    "check_hooks_to_add": "sae.add_hook(name, fn), which checks the name",
    "list_hooks": "sae.hook_dict",
    "remove_all_hook_fns": "sae.reset_hooks(including_permanent=True)",
    "clear_contexts": "sae.reset_hooks()",
    "setup": "nothing: hook points have their names from the start",
    "get_sae_class_for_architecture": "mechint.sae.find_architecture",
    "get_sae_config_class_for_architecture": "SAEConfig, which all architectures share",
    "get_activation_fn": "sae.activate(pre_activations)",
    "activation_fn": "sae.activate(pre_activations)",
    "run_time_activation_norm_fn_in": "sae.process_sae_in, which normalises and subtracts b_dec",
    "run_time_activation_norm_fn_out": "sae.decode, which undoes it",
    "reshape_fn_in": "sae.hook_z_reshaping_mode; heads are laid side by side by encode",
    "reshape_fn_out": "sae.hook_z_reshaping_mode; the call gives heads back one by one",
    "process_state_dict_for_saving": "sae.tensors()",
    "process_state_dict_for_loading": "SAE.from_tensors(...)",
    "initialize_weights": "SAE(SAEConfig(...)), which draws them",
    "training_forward_pass": "sae.loss(x, objective)",
    "calculate_aux_loss": "sae.loss(x, objective)",
    "encode_with_hidden_pre": "sae.pre_activations(x), then sae.activate(...)",
    "upload_to_hub": "upload_saes_to_huggingface, or `mechint publish-sae`",
}


class ElsewhereError(MechintError, AttributeError):
    """A name of SAELens's class that this one does not have."""
