"""GPT-NeoX from a chosen layer on, for a batch of changed residual streams whose first positions are the clean ones.

An intervention that first acts at position s leaves everything before s as it was (attention is causal), so only the
positions from s on have to be computed again, from the changed layer on, against the clean keys and values before s.
The layers are written out here, since transformers has no way in for a residual stream at a layer with a shared
prefix; `tests/test_suffix.py` holds them equal to the transformers model. Parameters are read from that model, never
changed, and cast when another precision is asked for (float64 is the reference that ablation falls back on).
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mechint.models import matmul

# Rotary variants whose angles do not depend on how long the sequence is.
FIXED_ROPE = frozenset({"default", "linear"})


class Span(NamedTuple):
    """`n` copies of one text from position `start` on. A flat batch's rows go by span, then copy, then position."""

    text: int
    start: int
    n: int


class CleanPass(NamedTuple):
    """What the suffix needs to know of the unchanged texts, right-padded to one length (causal: padding is inert)."""

    hooked: Float[Tensor, "text pos d_model"]  # what the hook holds
    resid: Float[Tensor, "text pos d_model"]  # entering `first_layer`
    keys: list[Float[Tensor, "text head pos d_head"]]  # one a layer from `first_layer` on, rotated
    values: list[Float[Tensor, "text head pos d_head"]]
    final: Float[Tensor, "text pos d_model"]  # after the final LayerNorm
    lengths: list[int]
    # What `first_layer` computes from each position by itself; None if the edit enters behind the last layer.
    entry: "LayerOutput | None"


class LayerOutput(NamedTuple):
    """A layer's output and the parts of it that are kept from a clean pass, as flat rows."""

    rows: Float[Tensor, "rows d_model"]
    qkv: Float[Tensor, "rows _"]
    attn: Float[Tensor, "rows d_model"]
    mlp: Float[Tensor, "rows d_model"]
    keys_values: list[tuple[Tensor, Tensor]]  # of each span, rotated


class EntryPoint(NamedTuple):
    """Where an edit enters: `layer` is the first one computed from it, `site` what the hook holds in the layer before
    (or, for "resid", the stream itself)."""

    layer: int
    site: Literal["resid", "mlp", "attn"]


def entry_point(hf_model: nn.Module, hook_name: str) -> EntryPoint | str:
    """Where an edit at `hook_name` can be moved to in the residual stream, or a phrase that says why it cannot.

    An edit of a hook whose value is added to the residual stream is the same edit of the stream after the addition:
    true for the stream itself, for the MLP's output, and for attention's where the MLP does not read it (parallel).
    """
    config: Any = getattr(hf_model, "config", None)
    if getattr(config, "model_type", None) != "gpt_neox":
        return f"the architecture is {getattr(config, 'model_type', type(hf_model).__name__)}, not gpt_neox"
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope not in FIXED_ROPE:
        return f"its rotary embedding is of type {rope!r}"
    parts = hook_name.split(".", 2)
    if len(parts) != 3 or parts[0] != "blocks" or not parts[1].isdigit():
        return f"{hook_name} is not in a block"
    layer, name = int(parts[1]), parts[2]
    if name == "hook_resid_pre":
        return EntryPoint(layer, "resid")
    if name == "hook_resid_post":
        return EntryPoint(layer + 1, "resid")
    if name == "hook_mlp_out":
        return EntryPoint(layer + 1, "mlp")
    if name == "hook_attn_out" and config.use_parallel_residual:
        return EntryPoint(layer + 1, "attn")
    return f"{name} is not simply added to the residual stream"


class NeoXSuffix:
    """The layers of a `GPTNeoXForCausalLM` from an entry point on, in `dtype` on `device` (the model's by default)."""

    def __init__(
        self,
        hf_model: nn.Module,
        entry: EntryPoint,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ):
        model: Any = hf_model
        self.neox: Any = model.gpt_neox
        self.config: Any = model.config
        parameter = next(model.parameters())
        self.dtype = dtype
        self.device = torch.device(device) if device is not None else parameter.device
        self.first_layer = entry.layer
        self.site = entry.site
        self.n_heads: int = self.config.num_attention_heads
        self.d_head: int = self.config.hidden_size // self.n_heads
        head: Any = model.get_output_embeddings()
        self.head_weight: Float[Tensor, "d_vocab d_model"] = head.weight.detach()
        self.head_bias: Float[Tensor, " d_vocab"] | None = head.bias.detach() if head.bias is not None else None

    def clean(self, tokens: Int[Tensor, "text pos"], lengths: list[int]) -> CleanPass:
        """Run whole right-padded texts and keep what `run` shares. Padding may be any token."""
        hidden = self._cast(F.embedding(tokens.to(self.neox.embed_in.weight.device), self.neox.embed_in.weight))
        n_texts, n_pos = tokens.shape
        whole = [Span(0, 0, n_texts)]  # which text a span is of only matters to the prefix, and there is none
        rotary = self._rotary(n_pos)
        rows = hidden.reshape(n_texts * n_pos, -1)
        resid, hooked, keys, values, entry = rows, rows, [], [], None
        for index in range(len(self.neox.layers)):
            if index == self.first_layer:
                resid = rows
            out = self._layer(index, rows, whole, rotary, [n_pos])
            rows = out.rows
            if index == self.first_layer - 1:
                hooked = {"resid": out.rows, "attn": out.attn, "mlp": out.mlp}[self.site]
            if index == self.first_layer:
                entry = out
            if index >= self.first_layer:
                ((key, value),) = out.keys_values
                keys.append(key)
                values.append(value)
        if self.first_layer == len(self.neox.layers):
            resid = rows
        final = self._norm(self.neox.final_layer_norm, rows)
        shape = (n_texts, n_pos, -1)
        return CleanPass(
            hooked.reshape(shape), resid.reshape(shape), keys, values, final.reshape(shape), lengths, entry
        )

    def run(
        self,
        rows: Float[Tensor, "rows d_model"],
        spans: list[Span],
        clean: CleanPass,
        changed: Bool[Tensor, " rows"] | None = None,
    ) -> Float[Tensor, "rows d_model"]:
        """The final LayerNorm's output for changed residual streams entering `first_layer`.

        `rows` holds, for each span and each of its copies, the stream at positions start .. length - 1 of its text.
        `changed` says which rows differ from the clean stream (all, if not given): what the first layer computes from
        the others alone, position by position, is taken from the clean pass.
        """
        n_pos = [clean.lengths[span.text] for span in spans]
        assert rows.shape[0] == sum(s.n * (n - s.start) for s, n in zip(spans, n_pos, strict=True))
        rotary = self._rotary(max(n_pos))
        for index in range(self.first_layer, len(self.neox.layers)):
            offset = index - self.first_layer
            prefix = (clean.keys[offset], clean.values[offset])
            reuse = None
            if index == self.first_layer and changed is not None and clean.entry is not None:
                reuse = Reuse(clean.entry, flat_positions(spans, clean).to(rows.device), torch.nonzero(changed)[:, 0])
            rows = self._layer(index, rows, spans, rotary, n_pos, prefix, reuse).rows
        return self._norm(self.neox.final_layer_norm, rows)

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor.detach().to(device=self.device, dtype=self.dtype)

    # Modules are taken as Any: a TransformerBridge leaves wrappers in their place, with the same weights.

    def _norm(self, norm: Any, rows: Tensor) -> Tensor:
        return F.layer_norm(rows, norm.normalized_shape, self._cast(norm.weight), self._cast(norm.bias), norm.eps)

    def _linear(self, linear: Any, rows: Tensor) -> Tensor:
        bias = None if linear.bias is None else self._cast(linear.bias)
        return matmul.linear(rows, self._cast(linear.weight), bias)

    def _rotary(self, n_pos: int) -> tuple[Tensor, Tensor]:
        """cos and sin, each [pos, rotary]: the model's own, which it computes in float32 whatever the precision."""
        device = self.neox.embed_in.weight.device
        probe = torch.empty(0, dtype=self.dtype if device.type != "mps" else torch.float32, device=device)
        cos, sin = self.neox.rotary_emb(probe, position_ids=torch.arange(n_pos, device=device).unsqueeze(0))
        return self._cast(cos[0]), self._cast(sin[0])

    def _layer(
        self,
        index: int,
        rows: Tensor,
        spans: list[Span],
        rotary: tuple[Tensor, Tensor],
        n_pos: list[int],
        prefix: tuple[Tensor, Tensor] | None = None,
        reuse: "Reuse | None" = None,
    ) -> LayerOutput:
        layer: Any = self.neox.layers[index]

        def qkv_of(rows: Tensor) -> Tensor:
            return self._linear(layer.attention.query_key_value, self._norm(layer.input_layernorm, rows))

        def mlp_of(rows: Tensor) -> Tensor:
            activation: Callable[[Tensor], Tensor] = layer.mlp.act
            hidden = self._linear(layer.mlp.dense_h_to_4h, self._norm(layer.post_attention_layernorm, rows))
            return self._linear(layer.mlp.dense_4h_to_h, activation(hidden))

        qkv = qkv_of(rows) if reuse is None else reuse.patched(reuse.clean.qkv, rows, qkv_of)
        mixed, keys_values = self._attend(qkv, spans, rotary, n_pos, prefix, layer.attention.scaling)
        attn = self._linear(layer.attention.dense, mixed)
        if layer.use_parallel_residual:
            mlp = mlp_of(rows) if reuse is None else reuse.patched(reuse.clean.mlp, rows, mlp_of)
            return LayerOutput((mlp + attn).add_(rows), qkv, attn, mlp, keys_values)
        after = attn + rows
        mlp = mlp_of(after)  # reads attention's output, which every position's copy has its own of
        return LayerOutput(after.add_(mlp), qkv, attn, mlp, keys_values)

    def _attend(
        self,
        qkv: Tensor,
        spans: list[Span],
        rotary: tuple[Tensor, Tensor],
        n_pos: list[int],
        prefix: tuple[Tensor, Tensor] | None,
        scale: float,
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Attention's mixture of values, before its output matrix, and each span's own keys and values."""
        mixed = qkv.new_empty(qkv.shape[0], self.n_heads * self.d_head)
        keys_values: list[tuple[Tensor, Tensor]] = []
        begin = 0
        for span, length in zip(spans, n_pos, strict=True):
            end = begin + span.n * (length - span.start)
            heads = qkv[begin:end].view(span.n, length - span.start, self.n_heads, 3 * self.d_head).transpose(1, 2)
            query, key, value = heads.chunk(3, dim=-1)
            cos, sin = (part[span.start : length] for part in rotary)
            query, key = rotate(query, cos, sin), rotate(key, cos, sin)
            keys_values.append((key, value))
            mask = None
            if prefix is not None and span.start > 0:
                before = (part[span.text, :, : span.start].expand(span.n, -1, -1, -1) for part in prefix)
                key, value = (torch.cat(pair, dim=2) for pair in zip(before, (key, value), strict=True))
                # Query s sees keys 0..s: the lower right corner of the causal triangle.
                mask = torch.ones(length - span.start, length, dtype=torch.bool, device=qkv.device).tril(span.start)
            out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale)
            mixed[begin:end] = out.transpose(1, 2).reshape(end - begin, -1)
            begin = end
        return mixed, keys_values


class Reuse(NamedTuple):
    """Rows of a clean layer to take over: `position` is each row's place there, `changed` the rows that differ."""

    clean: LayerOutput
    position: Int[Tensor, " rows"]
    changed: Int[Tensor, " changed"]

    def patched(self, clean: Tensor, rows: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """`compute(rows)`, computed at the changed rows only."""
        result = clean[self.position]
        result[self.changed] = compute(rows[self.changed])
        return result


def flat_positions(spans: list[Span], clean: CleanPass) -> Int[Tensor, " rows"]:
    """For each row of a flat batch, text * n_pos + position: its row in a flattened clean pass."""
    n_pos = clean.resid.shape[1]
    return torch.cat([s.text * n_pos + torch.arange(s.start, clean.lengths[s.text]).repeat(s.n) for s in spans])


def rotate(
    heads: Float[Tensor, "copy head pos d_head"], cos: Float[Tensor, "pos rotary"], sin: Float[Tensor, "pos rotary"]
) -> Float[Tensor, "copy head pos d_head"]:
    """Rotary position embedding of the first `rotary` dimensions, in GPT-NeoX's layout (half against half)."""
    width = cos.shape[-1]
    turned, rest = heads[..., :width], heads[..., width:]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((turned, rest), dim=-1)
