"""Scores of concepts against their closed forms, on tables small enough to do by hand or by brute force."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from mechint.concepts import probes, score, scores, structure
from mechint.concepts.codes import Codes, encode_rows, moments, pca_dictionary, random_dictionary
from mechint.concepts.labels import Labelled
from mechint.concepts.match import match_directions
from mechint.concepts.spans import Span, TokenMap, columns_of, label_tokens, read_span_file
from mechint.errors import MechintError


def random_table(n: int = 300, d_sae: int = 12, share: float = 0.3, seed: int = 0) -> np.ndarray:
    """Sparse non-negative values, many of them equal."""
    rng = np.random.default_rng(seed)
    values = rng.integers(1, 8, size=(n, d_sae)) / 4
    return (values * (rng.random((n, d_sae)) < share)).astype(np.float32)


def codes_from_table(acts: np.ndarray) -> Codes:
    return encode_rows(lambda x: x, [torch.from_numpy(np.asarray(acts, dtype=np.float32))], n_rows=len(acts))


def brute_f1(on: np.ndarray, label: np.ndarray) -> float:
    return 2 * (on & label).sum() / max(on.sum() + label.sum(), 1)


# --- spans and tokens -------------------------------------------------------------------------------------------------

TEXT = "a New York cat sat"
OFFSETS = [(0, 1), (1, 5), (5, 10), (10, 14), (14, 16), (16, 18)]  # " New", " York", " cat", " s", "at"


def labels_of(spans: list[Span], **settings) -> tuple[np.ndarray, list[Span]]:
    parents = {"place": None, "city": "place", "verb": None}
    table = np.zeros((len(OFFSETS), 3), dtype=bool)
    missed = label_tokens(TokenMap(TEXT, OFFSETS), spans, columns_of(parents), table, **settings)
    return table, missed


def test_a_span_marks_every_token_that_it_overlaps_for_its_concept_and_the_parents():
    table, missed = labels_of([Span(2, 10, "city"), Span(15, 18, "verb")])
    assert not missed
    assert table[:, 1].tolist() == [False, True, True, False, False, False]
    assert (table[:, 0] == table[:, 1]).all()  # place holds what city holds
    assert table[:, 2].tolist() == [False, False, False, False, True, True]


@pytest.mark.parametrize(("span_tokens", "marked"), [("first", 1), ("last", 2)])
def test_only_the_first_or_last_token_of_a_span(span_tokens: str, marked: int):
    table, _ = labels_of([Span(2, 10, "city")], span_tokens=span_tokens)
    assert np.flatnonzero(table[:, 1]).tolist() == [marked]


def test_a_blank_before_a_word_belongs_to_no_span():
    table, missed = labels_of([Span(10, 11, "city"), Span(1, 2, "city")])
    assert not table.any()
    assert len(missed) == 2
    table, _ = labels_of([Span(10, 12, "city")])  # the blank and the c of " cat"
    assert np.flatnonzero(table[:, 1]).tolist() == [3]


def test_byte_pieces_of_one_character_are_all_marked():
    table = np.zeros((3, 1), dtype=bool)
    label_tokens(TokenMap("aß", [(0, 1), (1, 2), (1, 2)]), [Span(1, 2, "x")], {"x": [0]}, table)
    assert table[:, 0].tolist() == [False, True, True]


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "labels.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_span_file_is_read(tmp_path: Path):
    file = read_span_file(write(tmp_path, "text_id,start,end,concept,parent\n3,0,2,city,place\n3,5,7,verb,\n9,,,,\n"))
    assert file.by == "text_id"
    assert file.texts == {3: [Span(0, 2, "city", 2), Span(5, 7, "verb", 3)], 9: []}
    assert file.parents == {"city": "place", "verb": None, "place": None}
    own = read_span_file(write(tmp_path, 'text,start,end,concept\n"a, b",0,1,letter\n'))
    assert own.by == "text"
    assert own.texts == {"a, b": [Span(0, 1, "letter", 2)]}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("start,end,concept\n0,1,a\n", "first line should name"),
        ("text_id,text,start,end,concept\n0,x,0,1,a\n", "first line should name"),
        ("", "first line should name"),
        ("text_id,start,end,concept\n", "holds no label"),
        ("text_id,start,end,concept\n0,,,\n", "holds no label"),
        ("text_id,start,end,concept\n0,1\n", "line 2: 2 values under 4"),
        ("text_id,start,end,concept\n0,1,2,a,b\n", "line 2: 5 values under 4"),
        ("text_id,start,end,concept\nx,1,2,a\n", "line 2: text_id should be a whole number, found 'x'"),
        ("text_id,start,end,concept\n0,1.5,2,a\n", "start should be a whole number"),
        ("text_id,start,end,concept\n0,-1,2,a\n", "should not be negative"),
        ("text_id,start,end,concept\n0,2,2,a\n", "from 2 to 2 is empty"),
        ("text_id,start,end,concept\n0,1,2,\n", "has no name"),
        ("text,start,end,concept\n ,1,2,a\n", "the text is empty"),
        ('text_id,start,end,concept\n0,1,2,"a', "line 2: unexpected end of data"),
        ("text_id,start,end,concept,parent\n0,1,2,a,b\n0,1,2,a,c\n", "parent 'c' here and 'b' before"),
        ("text_id,start,end,concept,parent\n0,1,2,a,b\n0,1,2,b,a\n", "a -> b -> a go round"),
    ],
)
def test_a_span_file_that_cannot_be_used_is_refused_in_one_line(tmp_path: Path, content: str, said: str):
    with pytest.raises(MechintError, match=said) as caught:
        read_span_file(write(tmp_path, content))
    assert "\n" not in str(caught.value)


def test_labels_that_are_not_there(tmp_path: Path):
    with pytest.raises(MechintError, match="labels not found"):
        read_span_file(tmp_path / "none.csv")


# --- codes ------------------------------------------------------------------------------------------------------------


def test_codes_hold_the_table_latent_by_latent_largest_first():
    table = random_table()
    codes = codes_from_table(table)
    assert codes.d_sae == 12
    assert (codes.counts() == (table > 0).sum(axis=0)).all()
    assert codes.l0 == pytest.approx((table > 0).sum() / len(table))
    for latent in range(12):
        rows, values = codes.of(latent)
        assert (np.diff(values) <= 0).all()
        assert (table[rows, latent] == values).all()
    assert (codes.table(range(12)) == table).all()
    wanted = np.array([7, 2, 2, 290])
    assert (codes.table([3, 1], wanted) == table[wanted][:, [3, 1]]).all()
    other = np.random.default_rng(1).random((len(table), 5)).astype(np.float32)
    assert np.allclose(codes.times(other), table.T @ other, atol=1e-4)


def test_encoding_in_parts_gives_the_same_codes():
    table = torch.from_numpy(random_table())
    whole = encode_rows(lambda x: x, [table], n_rows=300)
    parts = encode_rows(lambda x: x, table.split(7), n_rows=300)
    for a, b in zip(whole[:3], parts[:3], strict=True):
        assert (a == b).all()


def test_moments_are_the_mean_and_covariance():
    x = torch.randn(500, 6, generator=torch.Generator().manual_seed(0)) @ torch.randn(6, 6) + 100
    found = moments(x.split(64))
    assert torch.allclose(found.mean, x.double().mean(dim=0))
    assert torch.allclose(found.covariance, torch.cov(x.double().T, correction=0), atol=1e-6)


def test_principal_components_have_both_signs_and_fall_in_variance():
    x = torch.randn(2000, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 5.0, 2.0]) + 7
    acts = pca_dictionary(moments([x]))(x)
    assert acts.shape == (2000, 6)
    assert ((acts[:, :3] == 0) | (acts[:, 3:] == 0)).all()
    signed = acts[:, :3] - acts[:, 3:]
    assert torch.allclose(signed.std(dim=0), torch.tensor([5.0, 2.0, 1.0]), rtol=0.1)
    assert torch.allclose(signed[:, 0].abs(), (x - x.mean(dim=0))[:, 1].abs(), atol=1.0)


def test_a_random_dictionary_has_the_size_and_sparsity_asked_for_and_depends_on_its_seed():
    x = torch.randn(50, 16, generator=torch.Generator().manual_seed(0))
    acts = random_dictionary(x.mean(dim=0), 64, 5.3, 0)(x)
    assert acts.shape == (50, 64)
    assert ((acts > 0).sum(dim=1) == 5).all()
    assert not torch.equal(acts, random_dictionary(x.mean(dim=0), 64, 5.3, 1)(x))


# --- F1, AUROC, where activation lies ---------------------------------------------------------------------------------


def test_counts_are_those_of_every_row_looked_at():
    table = random_table()
    labels = np.random.default_rng(2).random((300, 4)) < 0.2
    codes = codes_from_table(table)
    thresholds = scores.choose_thresholds(codes)
    counts = scores.count(codes, labels.astype(np.float32), thresholds)
    assert (counts.on[:, 0] == codes.counts()).all()
    for latent in range(12):
        for t in range(len(scores.KEPT_SHARES)):
            on = (table[:, latent] >= thresholds.values[latent, t]) & (table[:, latent] > 0)
            assert counts.on[latent, t] == on.sum()
            for c in range(4):
                assert counts.hits[latent, t, c] == (on & labels[:, c]).sum()
                assert counts.f1()[latent, t, c] == pytest.approx(brute_f1(on, labels[:, c]))


def test_latents_that_are_never_active_count_nothing():
    table = random_table()
    table[:, [0, 5, 11]] = 0
    labels = np.ones((300, 1), dtype=np.float32)
    codes = codes_from_table(table)
    counts = scores.count(codes, labels, scores.choose_thresholds(codes))
    assert (counts.on[[0, 5, 11]] == 0).all()
    assert (counts.hits[[0, 5, 11]] == 0).all()
    assert (counts.hits[1] > 0).any()
    nothing = codes_from_table(np.zeros((10, 3), dtype=np.float32))
    empty = scores.count(nothing, labels[:10], scores.choose_thresholds(nothing))
    assert (empty.hits == 0).all()
    assert scores.score(nothing, labels[:10] > 0, scores.Best(np.array([0]), np.array([np.inf]))).f1[0] == 0


@pytest.mark.parametrize("seed", range(5))
def test_the_best_threshold_is_the_best_of_all(seed: int):
    table = random_table(seed=seed)
    label = np.random.default_rng(seed).random(300) < 0.3 * (1 + table[:, 4])
    codes = codes_from_table(table)
    f1, threshold = scores.best_threshold(codes, 4, label)
    tried = {value: brute_f1(table[:, 4] >= value, label) for value in np.unique(table[:, 4]) if value > 0}
    assert f1 == pytest.approx(max(tried.values()))
    assert brute_f1(table[:, 4] >= threshold, label) == pytest.approx(f1)
    assert threshold not in tried  # halfway between two values


def test_f1_precision_and_recall_by_hand():
    # on (>= 2): rows 0, 1, 3; concept: rows 0, 1, 2, 5
    codes = codes_from_table(np.array([[3], [2], [1], [4], [0], [0]], dtype=np.float32))
    labels = np.array([[1], [1], [1], [0], [0], [1]], dtype=bool)
    found = scores.score(codes, labels, scores.Best(np.array([0]), np.array([2.0])))
    assert found.precision[0] == pytest.approx(2 / 3)
    assert found.recall[0] == pytest.approx(2 / 4)
    assert found.f1[0] == pytest.approx(2 * 2 / (3 + 4))


def test_the_chosen_latent_is_the_one_that_tells_the_concept():
    table = random_table(d_sae=40)
    labels = np.stack([table[:, 17] >= 1.5, table[:, 3] > 0, np.random.default_rng(0).random(300) < 0.5], axis=1)
    codes = codes_from_table(table)
    counts = scores.count(codes, labels.astype(np.float32), scores.choose_thresholds(codes))
    best = scores.choose_best(codes, labels, counts)
    assert best.latent[:2].tolist() == [17, 3]
    assert 1.25 < best.threshold[0] <= 1.5
    assert scores.score(codes, labels, best).f1[:2].tolist() == [1.0, 1.0]


def test_auroc_counts_ties_as_half():
    from sklearn.metrics import roc_auc_score

    label = np.array([1, 1, 0, 0, 0], dtype=bool)
    assert scores.auroc(np.array([2.0, 1, 1, 0, 0]), label) == pytest.approx((3 + 2.5) / 6)
    assert math.isnan(scores.auroc(np.arange(5.0), np.ones(5, dtype=bool)))
    table = random_table()
    codes = codes_from_table(table)
    labels = np.random.default_rng(0).random((300, 3)) < 0.1 + 0.4 * (table[:, :3] > 1)
    for latent in range(12):
        for c in range(3):
            expected = roc_auc_score(labels[:, c], table[:, latent])
            assert scores.auroc(table[:, latent], labels[:, c]) == pytest.approx(expected)
            assert scores.latent_auroc(codes, latent, labels[:, c]) == pytest.approx(expected)


def test_the_coarse_auroc_is_exact_where_values_lie_on_the_thresholds():
    table = (random_table() > 0).astype(np.float32)  # one value, hence one threshold
    codes = codes_from_table(table)
    labels = np.random.default_rng(0).random((300, 2)) < 0.3
    counts = scores.count(codes, labels.astype(np.float32), scores.choose_thresholds(codes))
    coarse = scores.coarse_auroc(counts)
    for latent in range(12):
        for c in range(2):
            assert coarse[latent, c] == pytest.approx(scores.latent_auroc(codes, latent, labels[:, c]))


def test_shares_of_activation_by_hand():
    table = np.array([[4, 0, 0], [1, 2, 0], [0, 2, 0], [0, 0, 0]], dtype=np.float32)
    labels = np.array([[1, 0], [0, 0], [0, 1], [1, 1]], dtype=np.float32)
    place = scores.place_of_activation(codes_from_table(table), labels)
    assert np.allclose(place.mass[:2], [[4 / 5, 0], [0, 1 / 2]])
    assert np.allclose(place.top[:2], [[1 / 2, 0], [0, 1 / 2]])
    assert np.isnan(place.mass[2]).all()


def test_shares_look_at_the_strongest_rows():
    n = 3 * scores.N_TOP_ROWS
    table = np.arange(1, n + 1, dtype=np.float32)[:, None]
    labels = (np.arange(n) >= n - scores.N_TOP_ROWS // 2).astype(np.float32)[:, None]
    assert scores.place_of_activation(codes_from_table(table), labels).top[0, 0] == pytest.approx(0.5)


# --- splitting and absorption -----------------------------------------------------------------------------------------


def test_a_concept_in_three_disjoint_parts_is_split_over_three_latents():
    n = 300
    table = np.zeros((n, 6), dtype=np.float32)
    table[0:50, 1] = table[50:90, 2] = table[90:120, 4] = 1.0
    table[200:300, 3] = 1.0
    table[0:50, 5] = 2.0  # tells what latent 1 tells
    label = np.arange(n) < 120
    codes = codes_from_table(table)
    found = structure.split_detector(codes, label, (1, 0.5), list(range(6)))
    assert set(found.latents) == {1, 2, 4}
    assert structure.f1_of(found.on(codes), label) == 1.0


def test_a_further_latent_must_add_more_than_the_least_gain():
    n = 2000
    table = np.zeros((n, 2), dtype=np.float32)
    table[:940, 0] = 1.0
    table[940:1000, 1] = 1.0
    label = np.arange(n) < 1000
    codes = codes_from_table(table)
    gain = 1 - 2 * 940 / 1940
    assert 0.03 < gain < 0.031
    assert structure.split_detector(codes, label, (0, 0.5), [0, 1]).latents == (0, 1)
    table[940, 0] = 1.0  # now the gain is a little less
    table[940:943, 0] = 1.0
    codes = codes_from_table(table)
    assert structure.split_detector(codes, label, (0, 0.5), [0, 1]).latents == (0,)


def test_a_further_latent_is_taken_at_its_own_best_threshold():
    table = np.zeros((100, 2), dtype=np.float32)
    table[:20, 0] = 1.0
    table[20:40, 1] = 2.0
    table[40:90, 1] = 1.0
    label = np.arange(100) < 40
    found = structure.split_detector(codes_from_table(table), label, (0, 0.5), [0, 1])
    assert found.latents == (0, 1)
    assert found.thresholds[1] == pytest.approx(1.5)


def absorption_case(cosine: float, parent_tokens: int = 80) -> list[structure.Absorption]:
    """Parent on rows 0-99, child on rows 80-99; latent 0 fires on rows below `parent_tokens`, latent 1 on the child."""
    table = np.zeros((200, 3), dtype=np.float32)
    table[:parent_tokens, 0] = 1.0
    table[80:100, 1] = 1.0
    table[150:, 2] = 1.0
    labels = np.zeros((200, 2), dtype=bool)
    labels[:100, 0] = labels[80:100, 1] = True
    codes = codes_from_table(table)
    detectors = [structure.Detector((0,), (0.5,)), structure.Detector((1,), (0.5,))]
    cosines = np.array([[1.0, cosine, 0.0], [0.0, 1.0, 0.0]])
    return structure.absorption((codes, labels), (codes, labels), detectors, {1: 0}, cosines, 0.2)


def test_a_childs_latent_that_fires_in_place_of_its_parents_absorbs_it():
    (found,) = absorption_case(cosine=0.5)
    assert (found.child, found.parent, found.n_tokens, found.latents) == (1, 0, 20, (1,))
    assert found.rate == 1.0
    assert found.silent == 1.0
    assert found.silent_elsewhere == 0.0


def test_nothing_is_absorbed_where_the_parents_latent_fires_too():
    (found,) = absorption_case(cosine=0.5, parent_tokens=95)
    assert found.rate == pytest.approx(5 / 20)
    (found,) = absorption_case(cosine=0.5, parent_tokens=100)
    assert found.rate == found.silent == 0.0


def test_a_latent_that_does_not_point_the_parents_way_absorbs_nothing():
    (found,) = absorption_case(cosine=0.1)
    assert found.rate == 0.0
    assert found.silent == 1.0
    assert found.latents == ()


def test_a_parent_without_a_latent_of_its_own_cannot_be_absorbed():
    assert absorption_case(cosine=0.5, parent_tokens=30) == []


# --- probes -----------------------------------------------------------------------------------------------------------


def test_separations_are_differences_of_means_over_the_deviation():
    table = random_table()
    table[:, 0] = 0
    labels = np.random.default_rng(0).random((300, 2)) < 0.3
    found, deviation = probes.separations(codes_from_table(table), labels.astype(np.float32))
    assert np.allclose(deviation, table.std(axis=0), atol=1e-5)
    for latent in range(1, 12):
        for c in range(2):
            label = labels[:, c]
            expected = abs(table[label, latent].mean() - table[~label, latent].mean()) / table[:, latent].std()
            assert found[latent, c] == pytest.approx(expected, abs=1e-5)
    assert (found[0] == 0).all()


def test_two_latents_tell_together_what_neither_tells_alone():
    rng = np.random.default_rng(0)
    table = (rng.random((4000, 6)) + 0.5).astype(np.float32)
    label = table[:, 2] + table[:, 4] > 2.1
    codes = codes_from_table(table)
    rows = rng.permutation(4000)
    sample = probes.Sample(rows[:2000], label[rows[:2000]], rows[2000:], label[rows[2000:]])
    found, _ = probes.separations(codes, label.astype(np.float32)[:, None])
    assert set(np.argsort(-found[:, 0])[:2]) == {2, 4}
    one, two = probes.sparse_probes(codes, codes, found, [sample], (1, 2))[0]
    assert one < 0.93
    assert two > 0.999


def test_probes_are_measured_on_other_rows():
    """Labels that nothing tells: fitted rows could be learned by heart, others cannot."""
    rng = np.random.default_rng(0)
    fit, test = rng.normal(size=(60, 50)), rng.normal(size=(4000, 50))
    found = probes.probe(fit, rng.random(60) < 0.5, test, rng.random(4000) < 0.5)
    assert abs(found - 0.5) < 0.05
    known = rng.random(60) < 0.5
    assert probes.probe(fit, known, fit, known) > 0.99


def test_samples_are_capped_and_keep_their_labels(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(probes, "FIT_POSITIVES", 5)
    label = np.arange(10000) % 100 == 0
    sample = probes.sample_rows(label, label, 0)
    assert sample.fit_label.sum() == 5
    assert (~sample.fit_label).sum() == probes.FIT_NEGATIVES
    assert (label[sample.fit] == sample.fit_label).all()
    assert len(np.unique(sample.test)) == len(sample.test)


# --- matching true directions -----------------------------------------------------------------------------------------


def test_permuted_flipped_and_scaled_directions_match_perfectly():
    generator = torch.Generator().manual_seed(0)
    true = torch.randn(20, 32, generator=generator)
    order = torch.randperm(20, generator=generator)
    signs = torch.where(torch.rand(20, generator=generator) < 0.5, -1.0, 1.0)
    learned = true[order] * signs[:, None] * 3
    found = match_directions(learned, true)
    for name in ("mmcs", "mmcs_learned", "mcc", "uniqueness", "recovered"):
        assert getattr(found, name) == pytest.approx(1.0), name
    assert (found.true == order[found.learned]).all()
    assert torch.allclose(found.cosines, signs[found.learned])
    signed = match_directions(learned, true, signed=True)
    assert signed.mcc < 0.9
    assert match_directions(true[order], true, signed=True).mcc == pytest.approx(1.0)


def test_matching_of_orthogonal_directions_by_hand():
    """Two learned directions near the first true one, one near the second, none near the third."""
    true = torch.eye(3)
    a, b, c = 0.8, 0.96, 0.6
    learned = torch.tensor(
        [[a, 0, math.sqrt(1 - a * a)], [b, math.sqrt(1 - b * b), 0], [0, c, 0.0], [0, 0, 0]], dtype=torch.float32
    )
    learned[2, 0] = math.sqrt(1 - c * c)  # cosine 0.8 with the first, 0.6 with the second
    found = match_directions(learned[:3], true)
    assert found.mmcs == pytest.approx((b + c + math.sqrt(1 - a * a)) / 3, abs=1e-6)
    assert found.mmcs_learned == pytest.approx((a + b + math.sqrt(1 - c * c)) / 3, abs=1e-6)
    # one to one: 1st-3rd, 2nd-1st, 3rd-2nd is the best of the six assignments
    assert found.mcc == pytest.approx((math.sqrt(1 - a * a) + b + c) / 3, abs=1e-6)
    assert found.uniqueness == pytest.approx(1 / 3)
    assert found.recovered == pytest.approx(1 / 3)


def test_one_to_one_matching_is_the_best_of_all_permutations():
    from itertools import permutations

    generator = torch.Generator().manual_seed(1)
    learned, true = torch.randn(5, 4, generator=generator), torch.randn(5, 4, generator=generator)
    unit = torch.nn.functional.normalize
    cosines = (unit(learned) @ unit(true).T).abs()
    best = max(float(cosines[range(5), list(order)].mean()) for order in permutations(range(5)))
    assert match_directions(learned, true).mcc == pytest.approx(best, abs=1e-6)


def test_noise_lowers_every_score_of_a_matching():
    generator = torch.Generator().manual_seed(0)
    true = torch.nn.functional.normalize(torch.randn(30, 64, generator=generator), dim=1)
    noise = torch.nn.functional.normalize(torch.randn(30, 64, generator=generator), dim=1)
    noise = torch.nn.functional.normalize(noise - (noise * true).sum(dim=1, keepdim=True) * true, dim=1)
    for size in (0.1, 0.5):
        found = match_directions(true + size * noise, true)
        assert found.mcc == pytest.approx(1 / math.sqrt(1 + size**2), abs=1e-6)


def test_directions_of_other_widths_do_not_match():
    with pytest.raises(MechintError, match="width 3"):
        match_directions(torch.eye(3), torch.eye(4))
    with pytest.raises(MechintError, match="0 learned"):
        match_directions(torch.zeros(0, 4), torch.eye(4))


# --- a task as a whole ------------------------------------------------------------------------------------------------


def synthetic_task(n_texts: int = 60, length: int = 20, seed: int = 0, min_tokens: int = 20) -> score.Task:
    """Rows that are sums of three directions of six; the concepts a, b (child of a), noise and everything."""
    rng = np.random.default_rng(seed)
    n = n_texts * length
    on = rng.random((n, 4)) < 0.25
    on[:, 1] &= on[:, 0]  # b only where a is
    x = on.astype(np.float32) @ (4 * np.eye(4, 8, dtype=np.float32)) + 0.1 * rng.normal(size=(n, 8)).astype(np.float32)
    labels = np.stack([on[:, 0], on[:, 1], rng.random(n) < 0.2, np.ones(n, dtype=bool), np.arange(n) < 5], axis=1)
    labelled = Labelled(
        torch.from_numpy(x),
        np.arange(n),
        labels,
        np.repeat(np.arange(n_texts), length),
        np.where(on[:, 0], 1, 0) + 2 * (np.arange(n) % 3),
        {"a": None, "b": "a", "noise": None, "everything": None, "rare": None},
        labels.sum(axis=0).tolist(),
        "synthetic",
    )
    return score.make_task(labelled, seed=seed, min_tokens=min_tokens)


def test_halves_part_whole_texts_and_cover_everything():
    task = synthetic_task()
    assert (task.select ^ task.report).all()
    texts = task.labelled.text_ids
    assert not set(texts[task.select]) & set(texts[task.report])
    assert len(set(texts[task.select])) == 30


def test_concepts_that_cannot_be_scored_are_left_out_and_said():
    task = synthetic_task()
    assert task.concepts == ["a", "b", "noise"]
    assert task.skipped["everything"] == "on 100% of all tokens"
    assert "fewer than 20" in task.skipped["rare"]
    assert task.pairs() == {1: 0}
    with pytest.raises(MechintError, match="no concept of synthetic can be scored"):
        synthetic_task(min_tokens=10_000)


def test_directions_of_concepts_are_differences_of_means():
    task = synthetic_task()
    x = task.labelled.rows[torch.from_numpy(task.labelled.indices[task.select])].numpy()
    a = task.select_labels[:, 0]
    expected = x[a].mean(axis=0) - x[~a].mean(axis=0)
    assert np.allclose(task.directions[0], expected / np.linalg.norm(expected), atol=1e-4)


def test_a_dictionary_of_the_true_directions_scores_one_and_noise_scores_chance():
    task = synthetic_task()
    found = score.score_dictionary(task, lambda x: (x - 1).relu(), W_dec=torch.eye(8), ks=(1, 2))
    assert found.best.latent[:2].tolist() == [0, 1]
    assert found.scores.f1[:2].tolist() == [1.0, 1.0]
    assert found.auroc[:2].tolist() == [1.0, 1.0]
    assert found.n_split[:2].tolist() == [1, 1]
    assert found.probes[:2].min() > 0.999
    assert abs(found.probes[2, 0] - 0.5) < 0.12
    assert found.scores.f1[2] < 0.45
    assert found.coverage == pytest.approx(found.scores.f1.mean())
    low, high = found.coverage_interval
    assert low <= found.coverage <= high
    assert found.latents.concept[:2].tolist() == [0, 1]
    assert (found.latents.concept[4:] == -1).all()  # directions that are never on
    assert np.isnan(found.latents.f1[4:]).all()
    assert found.latents.mass_share[0] == pytest.approx(1.0)
    assert found.n_live == 4
    (absorbed,) = found.absorption
    assert absorbed.rate == absorbed.silent == 0.0


def test_what_is_chosen_does_not_depend_on_the_rows_that_are_reported_on():
    task = synthetic_task()
    first = score.score_dictionary(task, lambda x: (x - 1).relu(), ks=())
    labels = task.labelled.labels.copy()
    labels[task.report, :3] = ~labels[task.report, :3]
    labelled = Labelled(**{**vars(task.labelled), "labels": labels})
    other = score.make_task(labelled, seed=0)
    flipped = [other.concepts.index(name) for name in task.concepts if name in other.concepts]
    second = score.score_dictionary(other, lambda x: (x - 1).relu(), ks=())
    kept = [task.concepts.index(other.concepts[c]) for c in flipped]
    assert kept
    assert second.best.latent[flipped].tolist() == first.best.latent[kept].tolist()
    assert second.best.threshold[flipped].tolist() == first.best.threshold[kept].tolist()
    assert (second.scores.f1[flipped] < first.scores.f1[kept]).all()


def test_a_token_list_is_chosen_on_one_half():
    task = synthetic_task()
    found = score.token_f1(task)
    # token ids say a up to the mix of ids: odd ids are on a, whatever the rest
    assert found[0] == pytest.approx(1.0)
    assert found[2] < 0.45
    labels = task.labelled.labels.copy()
    labels[task.report] = ~labels[task.report]
    other = score.make_task(Labelled(**{**vars(task.labelled), "labels": labels}), seed=0)
    assert other.concepts[0] == "a"
    assert score.token_f1(other)[0] == 0.0


def test_baselines_are_scored_on_the_same_task():
    task = synthetic_task()
    others = score.baselines(task, 16, 2.0, ks=(1,))
    assert set(others) == {"random", "pca"}
    assert others["random"].d_sae == 16
    assert others["random"].l0 <= 2.0
    assert others["pca"].d_sae == 16
    assert score.dense_probes(task)[:2].min() > 0.999


def test_one_text_alone_cannot_be_scored():
    with pytest.raises(MechintError, match="label more texts"):
        synthetic_task(n_texts=1)


# --- benchmarks/concepts.py -------------------------------------------------------------------------------------------


def test_the_table_of_architectures_gives_means_over_seeds_and_leaves_out_what_was_not_measured():
    import importlib.util

    from mechint.sae.base import find_architecture

    path = Path(__file__).parents[1] / "benchmarks" / "concepts.py"
    spec = importlib.util.spec_from_file_location("benchmarks_concepts", path)
    assert spec is not None and spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    for architecture, flags in benchmark.FLAGS.items():
        assert find_architecture(architecture)
        assert set(flags) == set(benchmark.L0S)
    numbers = {name: 0.25 for name in benchmark.COLUMNS} | {"n_found": 7, "n_absorption_pairs": 3}
    member = {"name": "topk", "asked": 16, "seed": 0, "l0": 16.0, "coverage_ci": [0.1, 0.4], **numbers}
    members = [
        member,
        {**member, "seed": 1, "l0": 17.0, "coverage": 0.75, "n_found": 8},
        {**member, "name": "random", "fvu": None, "absorption": None},
    ]
    whole = {"concepts": 2, "texts": 3, "tokens": 4000, "token_coverage": 0.9, "dense": 0.99}
    lines = benchmark.table(members, whole).splitlines()
    assert "2 concepts on 4,000 tokens of 3 texts" in lines[0]
    header, _, topk, random = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line[:1] == "|"]
    assert len(header) == len(topk) == len(random)
    assert topk[:2] == ["topk", "16.5"]
    assert topk[header.index("coverage")] == "0.500 (0.250 to 0.750)"
    assert topk[header.index("F1 ≥ .5")] == "8"
    assert topk[header.index("pairs")] == "3"
    assert random[header.index("coverage")] == "0.250 [0.100, 0.400]"
    assert random[header.index("FVU")] == random[header.index("absorbed")] == ""
