"""Sums by text, intervals from them, histograms and counts of latents: each against its closed form."""

import numpy as np
import pytest
import torch

from mechint.eval import ReconstructionSums, bootstrap, density_histogram, evaluate_rows, l0_histogram, measure_rows
from mechint.eval.bootstrap import group_of_texts, reconstruction_intervals, resample
from mechint.eval.histograms import LOG10_EDGES, activity_metrics
from mechint.eval.sums import COLUMNS, reconstruction_metrics
from mechint.sae import StandardSAE

METRICS = (
    *("l0", "l1", "mse_per_dim", "mse_per_token", "fvu", "explained_variance", "explained_variance_legacy"),
    *("cosine", "l2_ratio", "relative_reconstruction_bias"),
)


def world(n: int = 60, n_texts: int = 7) -> tuple[StandardSAE, torch.Tensor, torch.Tensor]:
    """An SAE, rows whose mean is far from 0, and the text of each row."""
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(n, 5, generator=generator) * torch.tensor([3.0, 1, 1, 1, 0.2]) + 4
    texts = torch.randint(0, n_texts, (n,), generator=generator).sort().values * 10 + 3  # ids with gaps
    return StandardSAE(5, 12, generator=generator), rows, texts


def test_a_weighted_sum_of_texts_is_the_evaluation_of_those_texts() -> None:
    """What every interval rests on: weights 0, 1, 2, ... of texts give what repeating their rows gives."""
    sae, rows, texts = world()
    groups, n_groups = group_of_texts(texts)
    assert n_groups == 7 and groups.tolist() == ((texts - 3) // 10).tolist()
    sums = measure_rows(sae, rows, groups=groups, n_groups=n_groups, batch_size=11)
    weights = np.array([[1, 1, 1, 1, 1, 1, 1], [2, 0, 1, 0, 3, 0, 1], [0, 0, 0, 7, 0, 0, 0]], dtype=np.float64)
    totals, moved = weights @ sums.table.numpy(), weights @ sums.deviation.numpy()
    columns = {name: totals[:, index] for index, name in enumerate(COLUMNS)}
    found = reconstruction_metrics(columns, np.square(moved).sum(axis=1), 5)
    assert found.keys() == set(METRICS)
    for index, weight in enumerate(weights):
        repeated = torch.cat([rows[groups == group].repeat(int(n), 1) for group, n in enumerate(weight)])
        expected = evaluate_rows(sae, repeated)
        for name in METRICS:
            if name == "explained_variance_legacy":  # about the centre of all texts, in every resample
                x_hat = sae.run(repeated)[0].detach()
                squared = (repeated - rows.double().mean(dim=0)).square().sum(dim=1)
                about_all = 1 - (repeated - x_hat).double().square().sum(dim=1) / squared
                assert found[name][index] == pytest.approx(float(about_all.mean()), rel=1e-6)
            else:
                assert found[name][index] == pytest.approx(expected[name], rel=1e-6), name


def test_sums_by_text_add_up_to_the_sums() -> None:
    sae, rows, texts = world()
    groups, n_groups = group_of_texts(texts)
    apart = measure_rows(sae, rows, torch.arange(5, 50), groups=groups, n_groups=n_groups, batch_size=8)
    together = measure_rows(sae, rows, torch.arange(5, 50))
    assert torch.allclose(apart.table.sum(dim=0), together.table[0], rtol=1e-9)
    assert apart.metrics() == pytest.approx(together.metrics(), rel=1e-6)
    assert torch.equal(apart.l0_counts, together.l0_counts)
    # the order of the indices, and of the batches, does not matter: a row stays with its text
    shuffled = torch.arange(5, 50)[torch.randperm(45, generator=torch.Generator().manual_seed(0))]
    again = measure_rows(sae, rows, shuffled, groups=groups, n_groups=n_groups, batch_size=8)
    assert torch.equal(again.table, apart.table)


def test_rows_that_are_not_counted_are_summed_but_do_not_fire() -> None:
    sae, rows, _ = world(12)
    x_hat, acts = (part.detach() for part in sae.run(rows))
    counted = torch.arange(12) % 3 > 0
    sums = ReconstructionSums(5, 12)
    sums.add(rows, x_hat, acts, counted=counted)
    assert sums.n == 12 and sums.totals()["active"] == float((acts > 0).sum())
    assert sums.fire_counts.tolist() == (acts[counted] > 0).sum(dim=0).tolist()
    assert sums.l0_counts.tolist() == torch.bincount((acts[counted] > 0).sum(dim=1), minlength=13).tolist()


def test_an_interval_of_a_mean_is_that_of_the_central_limit() -> None:
    values = np.random.default_rng(1).normal(5.0, 2.0, size=400)
    found = resample(400, lambda weights: {"mean": weights @ values / weights.sum(axis=1)}, n_resamples=4000, seed=7)
    low, high = found["mean"]
    error = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - error, abs=0.05 * error)
    assert high == pytest.approx(values.mean() + error, abs=0.05 * error)


def test_intervals_are_seeded_and_the_blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    sae, rows, texts = world()
    groups, n_groups = group_of_texts(texts)
    sums = measure_rows(sae, rows, groups=groups, n_groups=n_groups)
    found = reconstruction_intervals(sums.table, sums.deviation, seed=4)
    assert found.keys() == set(METRICS)
    whole = sums.metrics()
    assert all(low < whole[name] < high for name, (low, high) in found.items())
    assert found == reconstruction_intervals(sums.table, sums.deviation, seed=4)
    assert found != reconstruction_intervals(sums.table, sums.deviation, seed=5)
    monkeypatch.setattr(bootstrap, "BLOCK", 100)
    assert {name: pytest.approx(pair, rel=1e-9) for name, pair in found.items()} == reconstruction_intervals(
        sums.table, sums.deviation, seed=4
    )


def test_intervals_that_cannot_be_given_are_left_out() -> None:
    def half(weights: np.ndarray) -> dict[str, np.ndarray]:
        return {"good": weights.sum(axis=1), "often undefined": np.where(weights[:, 0] > 0, 1.0, np.nan)}

    assert resample(1, half) == {} and resample(5, half, n_resamples=0) == {}
    # Each text is missing from about a third of the resamples.
    assert resample(5, half) == {"good": [5.0, 5.0]}


def test_more_texts_than_groups_share_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "MAX_GROUPS", 3)
    groups, n_groups = group_of_texts(torch.tensor([5, 5, 9, 11, 40, 40, 41]))
    assert n_groups == 3 and groups.tolist() == [0, 0, 1, 2, 0, 0, 1]


def test_counts_of_latents_by_hand() -> None:
    # of 200 rows: never; on 1 (0.5 %); on 2 (1 %, not more); on 3; on 20 (10 %, not more); on 21; on all
    counts = torch.tensor([0, 1, 2, 3, 20, 21, 200])
    assert activity_metrics(counts, 200) == {
        "dead_features": 1,
        "dead_fraction": 1 / 7,
        "alive_features": 6,
        "dense_features": 2,
        "dense_fraction": 2 / 7,
        "features_over_1_percent": 4,
    }


def test_density_histogram_by_hand() -> None:
    # densities 1, 0.1 (log10 -1: lower edge of its bin), 0.099, and one below the first edge
    n_rows = 10**9
    counts = torch.tensor([n_rows, n_rows // 10, n_rows // 10 - n_rows // 1000, 1, 0, 0])
    found = density_histogram(counts, n_rows)
    assert found["log10_edges"] == LOG10_EDGES and LOG10_EDGES[0] == -7.0 and LOG10_EDGES[-1] == 0.0
    assert found["n_dead"] == 2 and found["n_rows"] == n_rows
    held = {index: n for index, n in enumerate(found["counts"]) if n}
    assert held == {27: 1, LOG10_EDGES.index(-1.0): 1, LOG10_EDGES.index(-1.0) - 1: 1, 0: 1}
    assert sum(found["counts"]) + found["n_dead"] == len(counts)


@pytest.mark.parametrize(("highest", "width", "n_bins"), [(0, 1, 1), (3, 1, 4), (49, 1, 50), (50, 2, 26), (160, 4, 41)])
def test_l0_histogram(highest: int, width: int, n_bins: int) -> None:
    counts = torch.zeros(200, dtype=torch.int64)
    counts[highest] = 3
    counts[0] += 2
    found = l0_histogram(counts)
    assert found["edges"] == list(range(0, width * n_bins + 1, width)) and len(found["counts"]) == n_bins
    assert sum(found["counts"]) == 5 and found["counts"][highest // width] >= 3


def test_l0_of_rows() -> None:
    sae, rows, _ = world()
    sums = measure_rows(sae, rows, batch_size=7)
    l0 = (sae.encode(rows) > 0).sum(dim=1)
    assert sums.l0_counts.tolist() == torch.bincount(l0, minlength=13).tolist()
    found = l0_histogram(sums.l0_counts)
    assert sum(n * edge for n, edge in zip(found["counts"], found["edges"], strict=False)) == int(l0.sum())
