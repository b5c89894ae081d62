"""Top activations and decoder pairs against dense references; contexts; highlighting."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from mechint.analysis import (
    collect_top_activations,
    context_values,
    contexts,
    decoder,
    decoder_cosine_similarity,
    decoder_similarity_blocks,
    feature_consistency_score,
    highlight_html,
    highlight_text,
    search_token,
    top_decoder_pairs,
)
from mechint.data import Activations, open_activations
from mechint.errors import MechintError
from mechint.sae import StandardSAE


def make_sae(d_in: int, d_sae: int, seed: int = 0) -> StandardSAE:
    sae = StandardSAE(d_in, d_sae, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        sae.b_enc.uniform_(-1.0, 0.2)
    return sae


def reference_top(feature_acts: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    order = feature_acts.sort(dim=0, descending=True, stable=True)
    n, d_sae = feature_acts.shape
    values, rows = torch.full((d_sae, k), -torch.inf), torch.full((d_sae, k), -1)
    values[:, : min(k, n)] = order.values[:k].T
    rows[:, : min(k, n)] = order.indices[:k].T
    return values, rows


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 60), k=st.integers(1, 25), batch_size=st.integers(1, 70), seed=st.integers(0, 10_000),
    d_sae=st.sampled_from([8, 24]),
)  # fmt: skip
def test_top_activations_equal_a_stable_sort(n: int, k: int, batch_size: int, seed: int, d_sae: int) -> None:
    """8 latents are encoded densely, 24 through the sparse kernel."""
    generator = torch.Generator().manual_seed(seed)
    sae = make_sae(3, d_sae, seed)
    with torch.no_grad():
        sae.b_enc[0] = -100.0  # never fires
        # Values on a grid, through exact arithmetic: many ties, whatever the batch.
        sae.W_enc.copy_(torch.randint(-2, 3, (3, d_sae), generator=generator))
        sae.b_enc[1:] = torch.randint(-2, 2, (d_sae - 1,), generator=generator).float()
    acts = torch.randint(-2, 3, (n, 3), generator=generator).float()
    values, rows = collect_top_activations(sae, acts, k=k, batch_size=batch_size)
    expected_values, expected_rows = reference_top(sae.encode(acts).detach(), k)
    assert torch.equal(values, expected_values)
    assert torch.equal(rows, expected_rows)


def test_top_activations_of_fewer_rows_than_k_are_unfilled() -> None:
    values, rows = collect_top_activations(make_sae(3, 5), torch.randn(2, 3), k=4)
    assert values.shape == rows.shape == (5, 4)
    assert torch.isneginf(values[:, 2:]).all() and (rows[:, 2:] == -1).all()
    assert (values[:, :2] >= 0).all() and (rows[:, :2] >= 0).all()


def test_top_activations_refuse_the_wrong_width() -> None:
    with pytest.raises(MechintError, match="4 wide.*expects 3"):
        collect_top_activations(make_sae(3, 5), torch.randn(2, 4))


def test_similarity_is_the_cosine_and_blocks_tile_it() -> None:
    sae = make_sae(5, 11)
    with torch.no_grad():
        sae.W_dec.mul_(torch.rand(11, 1) + 0.5)  # not unit rows
    dense = decoder_cosine_similarity(sae)
    rows = sae.W_dec.detach()
    for i in range(11):
        for j in range(11):
            expected = float(rows[i] @ rows[j] / rows[i].norm() / rows[j].norm())
            assert float(dense[i, j]) == pytest.approx(expected, abs=1e-6)
    seen = torch.zeros(11, 11)
    for row, column, block in decoder_similarity_blocks(sae, block_size=4):
        part = (slice(row, row + 4), slice(column, column + 4))
        assert torch.allclose(block, dense[part], atol=1e-6)
        seen[part] += 1
    assert bool((seen.triu() == torch.ones(11, 11).triu()).all())


def test_similarity_refuses_a_matrix_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "MAX_SIMILARITY_BYTES", 100)
    with pytest.raises(MechintError, match="top_decoder_pairs"):
        decoder_cosine_similarity(make_sae(5, 11))


@settings(max_examples=40, deadline=None)
@given(
    d_sae=st.integers(2, 40), top_k=st.integers(1, 60), block_size=st.integers(1, 45), seed=st.integers(0, 10_000),
    distinct=st.integers(1, 40),
)  # fmt: skip
def test_top_pairs_are_exactly_k_in_the_dense_order(
    d_sae: int, top_k: int, block_size: int, seed: int, distinct: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    sae = make_sae(4, d_sae)
    with torch.no_grad():
        pool = torch.randn(distinct, 4, generator=generator)
        sae.W_dec.copy_(pool[torch.randint(0, distinct, (d_sae,), generator=generator)])
    unit = torch.nn.functional.normalize(sae.W_dec.detach().double(), dim=1)
    dense = (unit @ unit.T).float()
    expected = sorted((-float(dense[i, j]), i, j) for i in range(d_sae) for j in range(i + 1, d_sae))[:top_k]
    plain = decoder_similarity_blocks
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder, "decoder_similarity_blocks", lambda sae: plain(sae, block_size))
        pairs = top_decoder_pairs(sae, top_k)
    assert pairs == [(i, j, -negative) for negative, i, j in expected]
    assert len(pairs) == min(top_k, d_sae * (d_sae - 1) // 2)


def write_store(folder: Path, lengths: list[int], d_in: int = 3, first_position: int = 1) -> Activations:
    """A store written by hand after docs/store.md: texts of these lengths without their BOS rows (from position 1 on,
    unless another is given), token 100 + row."""
    n = sum(lengths)
    columns = {
        "activations": torch.randn(n, d_in, generator=torch.Generator().manual_seed(0)),
        "tokens": torch.arange(100, 100 + n, dtype=torch.int32),
        "text_ids": torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)),
        "positions": torch.cat([torch.arange(length, dtype=torch.int32) + first_position for length in lengths]),
    }
    folder.mkdir()
    save_file(columns, folder / "shard-00000.safetensors")
    info = {"format_version": 1, "d_in": d_in, "dtype": "float32", "shards": [{"name": "shard-00000.safetensors"}]}
    info["shards"][0] |= {"n_rows": n, "sha256": ""}
    (folder / "store.json").write_text(json.dumps(info))
    return open_activations(folder)


def test_contexts_stay_within_the_text_and_mark_the_token(tmp_path: Path) -> None:
    activations = write_store(tmp_path / "store", [3, 5, 4])  # rows 0-2, 3-7, 8-11
    first, middle, last = contexts(activations, [0, 5, -1, 11], window=3)
    assert (first.tokens, first.center, first.text_id, first.position) == ([100, 101, 102], 0, 0, 1)
    assert (middle.tokens, middle.center, middle.rows) == ([103, 104, 105, 106, 107], 2, [3, 4, 5, 6, 7])
    assert (last.tokens, last.center, last.position, last.row) == ([108, 109, 110, 111], 3, 4, 11)
    assert contexts(activations, torch.tensor([7]), window=1)[0].tokens == [106, 107]
    with pytest.raises(MechintError, match="row 12 .*12 rows"):
        contexts(activations, [12])
    torch.save(torch.randn(4, 3), tmp_path / "bare.pt")
    with pytest.raises(MechintError, match="without its tokens"):
        contexts(open_activations(tmp_path / "bare.pt"), [0])


def test_top_activations_and_their_contexts_from_a_store(tmp_path: Path) -> None:
    activations = write_store(tmp_path / "store", [3, 5, 4])
    sae = make_sae(3, 6)
    values, rows = collect_top_activations(sae, activations, k=2, batch_size=5)
    for latent in range(6):
        for value, context in zip(values[latent].tolist(), contexts(activations, rows[latent]), strict=True):
            shown = context_values(sae, activations, context, latent)
            assert len(shown) == len(context.tokens)
            assert float(shown[context.center]) == pytest.approx(value, abs=1e-6)


def test_search_token_is_case_sensitive_and_takes_both_forms() -> None:
    assert search_token({7: ["the cat", "a dog"], 3: ["Cat"]}, "cat") == [7]
    assert search_token([["x"], ["a Cat"], ["cat", "Cat"]], "Cat") == [1, 2]


def test_consistency_is_the_share_of_the_commonest() -> None:
    assert feature_consistency_score(["a", "b", "a", "a"]) == 0.75
    assert feature_consistency_score([5, 5]) == 1.0
    assert feature_consistency_score([]) == 0.0


def test_highlighting_escapes_and_scales() -> None:
    assert highlight_text(["a", "\n", "b"], 1) == "a>>>\u21b5<<<b"
    page = highlight_html(["<script>", "b&"], [1.0, 4.0], center=1)
    assert "<script>" not in page and "&lt;script&gt;" in page and "b&amp;" in page
    assert "rgba(255,140,0,0.25)" in page and "rgba(255,140,0,1.00)" in page and page.count("bold") == 1
    assert "rgba(255,140,0,0.00)" in highlight_html(["a"], [0.0])
    with pytest.raises(MechintError, match="2 tokens but 1 values"):
        highlight_html(["a", "b"], [1.0])
