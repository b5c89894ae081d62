"""The written-out GPT-NeoX layers against transformers, in float64 where equality can be tight."""

import pytest
import torch

from mechint.models.suffix import EntryPoint, NeoXSuffix, Span, entry_point, flat_positions


def neox(seed: int = 0, **changes):
    """A small GPT-NeoX with random weights, biases and LayerNorm gains: nothing in it is 0 or 1 by accident."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    settings = {
        "vocab_size": 61,
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    torch.manual_seed(seed)
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**{**settings, **changes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            base = 1.0 if "layernorm" in name.replace("_", "") and name.endswith("weight") else 0.0
            parameter.copy_(base + 0.2 * torch.randn_like(parameter))
    return model


def edited_by_transformers(model, tokens, first_layer: int, edit):
    """The final LayerNorm's output when `edit` changes what enters `first_layer`, by a hook on transformers' module."""
    layers = model.gpt_neox.layers
    target = layers[first_layer] if first_layer < len(layers) else model.gpt_neox.final_layer_norm
    handle = target.register_forward_pre_hook(lambda module, args: (edit(args[0]), *args[1:]))
    try:
        with torch.no_grad():
            return model.gpt_neox(tokens).last_hidden_state
    finally:
        handle.remove()


VARIANTS = {
    "parallel": {},
    "sequential": {"use_parallel_residual": False},
    "gelu_new": {"hidden_act": "gelu_new"},
    "gelu_fast": {"hidden_act": "gelu_fast"},
    "relu": {"hidden_act": "relu"},
    "full_rotary": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 1.0}},
    "linear_rope": {
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    },
    "no_attention_bias": {"attention_bias": False},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)], ids=["float64", "float32"]
)
def test_equals_transformers(variant: str, dtype: torch.dtype, tolerance: float):
    model = neox(**VARIANTS[variant]).to(dtype)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 61, (3, 12), generator=generator)
    lengths = [12, 9, 10]
    spans = [Span(0, 5, 2), Span(0, 7, 1), Span(1, 0, 3), Span(2, 9, 2)]
    for first_layer in (0, 2, 4):
        suffix = NeoXSuffix(model, EntryPoint(first_layer, "resid"), dtype=dtype)
        with torch.inference_mode():
            clean = suffix.clean(tokens, lengths)
            torch.testing.assert_close(
                clean.final, edited_by_transformers(model, tokens, first_layer, lambda x: x), rtol=0, atol=tolerance
            )
            changes = [torch.randn(s.n, lengths[s.text] - s.start, 32, generator=generator).to(dtype) for s in spans]
            rows = torch.cat(
                [
                    (clean.resid[s.text, s.start : lengths[s.text]] + c).reshape(-1, 32)
                    for s, c in zip(spans, changes, strict=True)
                ]
            )
            got = suffix.run(rows, spans, clean)
            # Rows said to be unchanged are taken from the clean pass.
            kept = torch.rand(rows.shape[0], generator=generator) < 0.5
            some = rows.clone()
            some[kept] = clean.resid.flatten(0, 1)[flat_positions(spans, clean)[kept]]
            torch.testing.assert_close(
                suffix.run(some, spans, clean, ~kept), suffix.run(some, spans, clean), rtol=0, atol=tolerance
            )
        expected = []
        for span, change in zip(spans, changes, strict=True):
            for copy in change:

                def edit(resid, span=span, copy=copy):
                    resid = resid.clone()
                    resid[0, span.start :] += copy
                    return resid

                text = tokens[span.text, : lengths[span.text]].unsqueeze(0)
                expected.append(edited_by_transformers(model, text, first_layer, edit)[0, span.start :])
        torch.testing.assert_close(got, torch.cat(expected), rtol=0, atol=tolerance)


def test_float64_from_a_float32_model_is_the_float64_model():
    model = neox()
    tokens = torch.randint(0, 61, (2, 7), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        precise = NeoXSuffix(model, EntryPoint(1, "resid"), dtype=torch.float64).clean(tokens, [7, 7])
    assert precise.final.dtype == torch.float64
    assert next(model.parameters()).dtype == torch.float32
    expected = edited_by_transformers(model.double(), tokens, 1, lambda x: x)
    torch.testing.assert_close(precise.final, expected, rtol=0, atol=1e-12)


def test_wrong_prefix_is_noticed():
    """The comparison above can fail: with another text's keys and values the result differs."""
    model = neox().double()
    tokens = torch.randint(0, 61, (2, 8), generator=torch.Generator().manual_seed(3))
    suffix = NeoXSuffix(model, EntryPoint(2, "resid"), dtype=torch.float64)
    with torch.inference_mode():
        clean = suffix.clean(tokens, [8, 8])
        rows = clean.resid[0, 4:]
        right = suffix.run(rows, [Span(0, 4, 1)], clean)
        swapped = clean._replace(keys=[k.flip(0) for k in clean.keys], values=[v.flip(0) for v in clean.values])
        wrong = suffix.run(rows, [Span(0, 4, 1)], swapped)
    torch.testing.assert_close(right, clean.final[0, 4:], rtol=0, atol=1e-12)
    assert (wrong - right).abs().max() > 1e-3


@pytest.mark.parametrize(("site", "module"), [("mlp", "mlp"), ("attn", "attention"), ("resid", None)])
def test_hooked_value_is_what_the_module_gives(site: str, module: str | None):
    model = neox().double()
    tokens = torch.randint(0, 61, (2, 6), generator=torch.Generator().manual_seed(4))
    found = []
    layer = model.gpt_neox.layers[1]
    target = getattr(layer, module) if module else layer
    handle = target.register_forward_hook(lambda module, args, out: found.append(out))
    with torch.inference_mode():
        model(tokens)
        handle.remove()
        clean = NeoXSuffix(model, EntryPoint(2, site), dtype=torch.float64).clean(tokens, [6, 6])
    expected = found[0][0] if isinstance(found[0], tuple) else found[0]
    torch.testing.assert_close(clean.hooked, expected, rtol=0, atol=1e-12)


def test_entry_point():
    model, sequential = neox(), neox(use_parallel_residual=False)
    assert entry_point(model, "blocks.2.hook_resid_pre") == (2, "resid")
    assert entry_point(model, "blocks.3.hook_resid_post") == (4, "resid")
    assert entry_point(model, "blocks.1.hook_mlp_out") == (2, "mlp")
    assert entry_point(sequential, "blocks.1.hook_mlp_out") == (2, "mlp")
    assert entry_point(model, "blocks.1.hook_attn_out") == (2, "attn")
    assert "residual" in str(entry_point(sequential, "blocks.1.hook_attn_out"))
    assert "residual" in str(entry_point(model, "blocks.1.attn.hook_z"))
    assert "block" in str(entry_point(model, "hook_embed"))
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    assert "dynamic" in str(entry_point(neox(rope_parameters=dynamic), "blocks.1.hook_resid_post"))
    assert "not gpt_neox" in str(entry_point(torch.nn.Linear(2, 2), "blocks.1.hook_resid_post"))
