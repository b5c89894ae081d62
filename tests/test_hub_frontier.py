"""The choice of checkpoints: nothing dominated, both ends, never too many, whatever the order they come in."""

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mechint.errors import MechintError
from mechint.hub.frontier import Candidate, flat, pareto, select, select_layers, when

DATES = ("", "2025-11-01T00:00:00", "2025-11-01T00:00:00Z", "2025-12-24T10:00:00+01:00", "not a date")


def point(name: str, l0: int | float, nmse: int | float, date: str = "", layer: int = 0) -> Candidate:
    return Candidate(name, layer, float(l0), float(nmse), date)


# few values, so that ties are common
levels = st.one_of(st.sampled_from([1.0, 2.0, 4.0, 8.0, 100.0]), st.floats(1e-3, 1e5))
errors = st.one_of(st.sampled_from([0.0, 0.1, 0.2, 0.5]), st.floats(0.0, 2.0))
runs = st.lists(st.tuples(levels, errors, st.sampled_from(DATES), st.integers(0, 2)), min_size=1, max_size=30).map(
    lambda rows: [point(f"run{i:04d}", l0, nmse, date, layer) for i, (l0, nmse, date, layer) in enumerate(rows)]
)


def dominates(a: Candidate, b: Candidate) -> bool:
    return a.l0 <= b.l0 and a.nmse <= b.nmse and (a.l0 < b.l0 or a.nmse < b.nmse)


@settings(max_examples=300, deadline=None)
@given(runs, st.integers(2, 8))
def test_no_chosen_point_is_dominated_and_both_ends_are_chosen(candidates: list[Candidate], most: int):
    chosen = select(candidates, most)
    assert not [(a, b) for a in candidates for b in chosen if dominates(a, b)]
    assert chosen[0].l0 == min(c.l0 for c in candidates)
    assert chosen[-1].nmse == min(c.nmse for c in candidates)
    assert len(chosen) == min(most, len(pareto(candidates))) and len(set(c.run_id for c in chosen)) == len(chosen)
    assert all(a.l0 < b.l0 and a.nmse > b.nmse for a, b in zip(chosen, chosen[1:], strict=False))


@settings(max_examples=200, deadline=None)
@given(runs, st.integers(2, 8), st.randoms(use_true_random=False))
def test_the_order_of_the_input_does_not_matter(candidates: list[Candidate], most: int, order: random.Random):
    shuffled = list(candidates)
    order.shuffle(shuffled)
    assert select_layers(shuffled, most) == select_layers(candidates, most)


@settings(max_examples=100, deadline=None)
@given(runs)
def test_every_point_off_the_frontier_is_matched_or_beaten_by_one_on_it(candidates: list[Candidate]):
    frontier = pareto(candidates)
    for candidate in candidates:
        assert any(c.l0 <= candidate.l0 and c.nmse <= candidate.nmse for c in frontier)


def test_interior_points_lie_at_equal_steps_of_log_l0():
    dense = [point(f"r{i}", 2.0 ** (i / 4), 1.0 - i / 100) for i in range(41)]  # L0 from 1 to 1024
    assert [c.l0 for c in select(dense, 6)] == pytest.approx([1, 4, 16, 64, 256, 1024])
    denser = [point(f"r{i}", 50 * 2.0 ** (i / 4), 1.0 - i / 100) for i in range(41)]  # the range counts, not its start
    assert [c.l0 for c in select(denser, 6)] == pytest.approx([50 * 4**i for i in range(6)])
    assert [c.l0 for c in select(dense, 5)] == pytest.approx([2 ** (2.5 * i) for i in range(5)])
    assert [c.l0 for c in select(dense, 3)] == pytest.approx([1, 32, 1024])
    assert select(dense, 2) == [dense[0], dense[-1]]
    assert select(dense, 41) == dense


def test_of_two_points_equally_near_the_one_with_the_lower_error_is_taken():
    points = [point("a", 1, 0.9), point("b", 8, 0.5), point("c", 32, 0.4), point("d", 256, 0.1)]  # target 16
    assert [c.run_id for c in select(points, 3)] == ["a", "c", "d"]


def test_ties_go_to_the_lower_error_and_then_to_the_later_date():
    same_l0 = [point("worse", 5, 0.3, "2026-01-01"), point("better", 5, 0.2, "2020-01-01")]
    assert [c.run_id for c in pareto(same_l0)] == ["better"]
    old, new = point("zz", 5, 0.2, "2025-11-01T09:00:00Z"), point("aa", 5, 0.2, "2025-11-01T11:00:00+01:00")
    assert [c.run_id for c in pareto([new, old])] == ["aa"]  # 10:00 in UTC, though its text is not the later one
    assert [c.run_id for c in pareto([old, point("unknown", 5, 0.2)])] == ["zz"]
    assert [c.run_id for c in pareto([point("a", 5, 0.2), point("b", 5, 0.2)])] == ["b"]


def test_an_equal_error_at_more_active_latents_is_dominated():
    assert [c.run_id for c in pareto([point("dense", 9, 0.2), point("sparse", 5, 0.2)])] == ["sparse"]


def test_layers_are_chosen_from_one_by_one():
    points = [point("a", 1, 0.5, layer=23), point("b", 1, 0.1, layer=7), point("c", 2, 0.4, layer=23)]
    chosen = select_layers(points)
    assert list(chosen) == [7, 23] and [c.run_id for c in flat(chosen)] == ["b", "a", "c"]


def test_what_has_no_place_on_a_log_axis_is_refused():
    for bad in (point("zero", 0, 0.5), point("nan", 1, math.nan)):
        with pytest.raises(MechintError, match=bad.run_id):
            select([bad], 6)
    with pytest.raises(MechintError, match="--max-per-layer 1"):
        select([point("a", 1, 0.5)], 1)


def test_dates():
    assert when("2025-11-01") == when("2025-11-01T00:00:00Z") < when("2025-11-01T00:00:01")
    assert when("") == when("yesterday") == -math.inf
