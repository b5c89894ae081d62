"""The benchmarks' own arithmetic: search, interpolation, limits, and that the stand-ins are what they claim to be."""

import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks"


def load(name: str, as_name: str = "") -> ModuleType:
    """A file of benchmarks/ as the module that the others there import; those that it imports come first."""
    spec = importlib.util.spec_from_file_location(as_name or name, FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[as_name or name] = module
    spec.loader.exec_module(module)
    return module


peers, peer_trainers = load("peers"), load("peer_trainers")
quality_member, quality = load("quality_member"), load("quality")
train_rows, train_limit = load("train_rows"), load("train_limit")
train_settings, train_whole = load("train_settings"), load("train_whole")
benchmark = load("train", "benchmarks_train")  # the repository has another train.py


# --- quality: search and interpolation --------------------------------------------------------------------------------


@pytest.mark.parametrize("slope", [-0.6, -1.0, -2.2])
@pytest.mark.parametrize("start", [0.01, 1.0, 40.0])
def test_search_brackets_every_l0(slope: float, start: float):
    def l0_of(coefficient: float) -> float:
        return min(1024.0, 30.0 * coefficient**slope)

    points: list[tuple[float, float]] = []
    for target in (16.0, 32.0, 64.0):
        for _ in range(10):
            coefficient = quality.next_coefficient(points, target, start)
            if coefficient is None:
                break
            points.append((coefficient, l0_of(coefficient)))
        l0s = [l0 for _, l0 in points]
        near = min(abs(math.log(l0 / target)) for l0 in l0s) < 0.02
        below, above = [l0 for l0 in l0s if l0 < target], [l0 for l0 in l0s if l0 > target]
        assert near or (below and above and min(above) / max(below) < quality.CLOSE)
    assert len(points) <= 12


def test_interpolation_is_exact_on_a_power_law():
    results = [{"l0": l0, "fvu": 2.0 * l0**-0.7, "dead": 3.0 * math.log(l0)} for l0 in (10.0, 40.0, 90.0)]
    found = quality.interpolate(results, 20.0)
    assert found is not None
    assert found["fvu"] == pytest.approx(2.0 * 20.0**-0.7)
    assert found["dead"] == pytest.approx(3.0 * math.log(20.0))
    assert quality.interpolate(results, 9.0) is None and quality.interpolate(results, 95.0) is None
    assert quality.interpolate([{"l0": 19.8, "fvu": 0.5}], 20.0) == {"fvu": 0.5}


def test_seeds_start_from_the_trainings_around_a_target():
    members = [{"sparsity": lam, "result": {"l0": 100 / lam}} for lam in (1.0, 2.0, 5.0, 9.0)]
    assert quality.around(members, 30.0) == [5.0, 2.0]
    low, high = quality.around(members, 100.0)[:2]
    assert low <= 1.0 <= high
    assert quality.around(members[:1], 101.0) == pytest.approx([1 / 1.06, 1.06])


def test_table_groups_seeds_and_keeps_settings_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    monkeypatch.setattr(quality, "FOLDER", tmp_path)
    (tmp_path / "members").mkdir()
    base = {"world": "tales", "d_sae": 64, "batch_size": 8, "steps": 5, "architecture": "topk", "family": "saelens"}
    number = 0
    for lr, fvus in {1e-3: (0.2, 0.3), 3e-3: (0.1, 0.2)}.items():
        for seed, fvu in enumerate(fvus):
            result = {"l0": 15.0, "fvu": fvu, "dead": 4, "seconds": 1.0}
            member = base | {"lr": lr, "scale": "none", "seed": seed, "sparsity": 16.0, "result": result}
            (tmp_path / "members" / f"{(number := number + 1)}.json").write_text(json.dumps(member))
    args = SimpleNamespace(
        world="tales", d_sae=64, batch_size=8, steps=5, architectures=[], targets=[16.0], short=False
    )
    quality.print_table(args)
    rows = [line for line in capsys.readouterr().out.splitlines() if "saelens" in line]
    assert [row.split("|")[3:6] for row in rows] == [
        [" saelens lr 0.003, scale none ", " 2 ", " 0.1500 (0.0707) "],
        [" saelens lr 0.001, scale none ", " 2 ", " 0.2500 (0.0707) "],
    ]


def test_a_search_goes_on_from_what_an_earlier_one_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    trained: list[float] = []

    def run_member(spec: dict[str, Any]) -> dict[str, Any]:
        trained.append(spec["sparsity"])
        result = {"l0": 40 / spec["sparsity"], "fvu": 0.1, "dead": 0, "seconds": 0.0}
        member = spec | {"result": result}
        (tmp_path / "members" / f"{len(trained)}.json").write_text(json.dumps(member))
        return member

    (tmp_path / "members").mkdir()
    monkeypatch.setattr(quality, "FOLDER", tmp_path)
    monkeypatch.setattr(quality, "run_member", run_member)
    monkeypatch.setattr(quality, "first_guess", lambda spec: 1.0)
    spec = {"family": "saelens", "architecture": "standard", "lr": 1e-3, "seed": 0}
    first = quality.run_curve((spec, (16.0, 32.0, 64.0), ()))
    assert quality.at_targets(first, (16.0, 32.0, 64.0)).keys() == {16.0, 32.0, 64.0}
    count = len(trained)
    again = quality.run_curve((spec, (16.0, 32.0, 64.0), ()))
    assert len(trained) == count and len(again) == len(first)
    quality.run_curve((spec | {"seed": 1}, (32.0,), ()))
    assert len(trained) > count  # another seed is another search


# --- quality: one member ----------------------------------------------------------------------------------------------


@pytest.fixture
def small_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(quality_member, "FOLDER", tmp_path)
    monkeypatch.setattr(quality_member, "N_SYNTHETIC", 3000)
    quality_member.open_world.cache_clear()
    yield tmp_path
    quality_member.open_world.cache_clear()


def test_batches_go_through_all_training_rows_once_an_epoch(small_world: Path):
    world = quality_member.open_world("synthetic", 0)
    batches = [quality_member.batch(world, step, 100, seed=3) for step in range(len(world.train) // 100)]
    rows = torch.cat(batches)
    assert len(rows.unique(dim=0)) == len(rows) == len(world.train) // 100 * 100
    assert torch.equal(quality_member.batch(world, 0, 100, seed=3), batches[0])
    assert not torch.equal(quality_member.batch(world, 0, 100, seed=4), batches[0])
    held_out = {tuple(row) for row in world.rows[world.val].tolist()}
    assert not held_out & {tuple(row) for row in rows.tolist()}


def test_synthetic_rows_are_sparse_sums_of_their_directions():
    rows, directions = quality_member.synthetic_rows(20_000)
    assert torch.allclose(directions.norm(dim=1), torch.ones(len(directions)), atol=1e-5)
    offset = rows.mean(dim=0)
    # 16 of strength with second moment 1.25 each, in random directions: a squared norm of 20 around the mean, less what
    # the mean takes of the frequent ones.
    spread = float((rows - offset).square().sum(dim=1).mean())
    assert 16 < spread < 21
    again, _ = quality_member.synthetic_rows(100)
    assert again.shape == (100, 128)


@pytest.mark.slow
def test_member_of_ours_trains_measures_and_is_not_trained_twice(small_world: Path, monkeypatch: pytest.MonkeyPatch):
    spec = {"world": "synthetic", "family": "mechint", "architecture": "standard", "d_sae": 256, "batch_size": 64}
    spec |= {
        "steps": 30,
        "seed": 0,
        "sparsity": 1.0,
        "flags": ["--lr", "1e-2", "--warmup-steps", "0", "--split-by", "row"],
    }
    done = quality_member.run_member(spec)
    result = done["result"]
    assert 0 < result["fvu"] < 1.0 and 0 < result["l0"] < 256 and 0 <= result["dead"] < 256
    assert 0 < result["mmcs"] < 1 and 0 <= result["recovered"] <= 1

    def fail(*_: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(quality_member, "train_ours", fail)
    assert quality_member.run_member(spec) == done
    with pytest.raises(AssertionError, match="trained again"):
        quality_member.run_member(spec | {"seed": 1})


def test_measure_scores_a_perfect_dictionary_perfectly(small_world: Path):
    world = quality_member.open_world("synthetic", 0)
    assert world.directions is not None
    identity = quality_member.Applied(lambda x: x, lambda f: f, world.directions)
    identity.d_sae = 128  # feature_acts are the inputs themselves
    result = quality_member.measure(identity, world, ce=False)
    assert result["fvu"] == pytest.approx(0.0, abs=1e-12)
    assert result["mmcs"] == pytest.approx(1.0, abs=1e-5) and result["recovered"] == 1.0


# --- speed ------------------------------------------------------------------------------------------------------------


def planted(d_in: int = 32, d_sae: int = 96) -> tuple[torch.Tensor, Any]:
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(40, d_in, generator=generator), dim=1)
    rows = torch.rand(4000, 40, generator=generator).pow(8) @ directions + 1.0
    return rows, train_rows.plant(rows, directions, d_sae, (5.0, 20.0))


@pytest.mark.parametrize("architecture", ["standard", "gated", "jumprelu", "topk", "batchtopk", "matryoshka_batchtopk"])
def test_our_steps_are_timed_at_the_l0_they_state(architecture: str):
    rows, weights = planted()
    contender = train_rows.ours(architecture, "dense", rows, weights, 128, 5.0)
    for step in range(3):
        contender.step(step)
    assert contender.n_active() == pytest.approx(5.0, rel=0.15)


def test_original_loop_is_the_dense_reference_step():
    """The same weights and rows: loss, clipping, Adam and renormalisation agree with our reference kernel.

    In float64: steps of float32 drift apart where rounding decides whether an entry is active, or a gradient's sign.
    """
    from mechint.kernels import DenseKernel, StepSettings
    from mechint.sae import Objective, StandardSAE

    rows, weights = planted()
    rows = rows.double() * 10  # large enough gradients for the clipping to matter
    theirs = train_rows.OriginalSAE(weights, 32, 96).double()
    torch.nn.init.constant_(theirs.b_enc, -weights.cut[20.0])
    loop = train_rows.OriginalLoop(rows, theirs, 64)
    ours = StandardSAE(32, 96).double()
    with torch.no_grad():
        for name, value in {"W_enc": theirs.W_enc, "b_enc": theirs.b_enc, "W_dec": theirs.W_dec}.items():
            ours.get_parameter(name).copy_(value)
        ours.b_dec.copy_(theirs.b_pre)
    kernel = DenseKernel(ours, torch.optim.Adam(ours.parameters(), lr=1e-3))
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        picked = torch.randint(0, len(rows), (64,), generator=generator)
        loop.step(1e-3, 0.5)
        result = kernel.step(rows[picked], StepSettings(1e-3, 1.0, Objective(sparsity=0.5)))
        assert float(result.grad_norm) > 1.0
        assert float(result.terms["mse"]) == pytest.approx(float(loop.last["mse"]), rel=1e-9)
        assert float(result.terms["l1"]) == pytest.approx(float(loop.last["l1"]), rel=1e-9)
    for name, value in {
        "W_enc": theirs.W_enc,
        "b_enc": theirs.b_enc,
        "W_dec": theirs.W_dec,
        "b_dec": theirs.b_pre,
    }.items():
        torch.testing.assert_close(ours.get_parameter(name), value, rtol=0, atol=1e-9, check_stride=False)


def test_limit_is_the_lower_of_its_two_sums():
    rates = {"mm_gflops": 100.0, "onednn_gflops": 400.0, "bf16_gflops": 800.0, "stream_gbs": 40.0}
    rates |= {"gather_gbs": 150.0, "near_gbs": 300.0}
    rows = 4 * 4096 * 512  # bytes that a gather reads per unit of L0
    adam = 28 * (2 * 512 * 4096 + 512 + 4096) / 40e6
    for l0, better in ((32, "bfloat16"), (1000, "float32")):
        parts = train_limit.limit_ms(rates, 4096, 512, 4096, l0)
        float32 = 17.18 / 0.4 + adam + l0 * rows * (3 / 150 + 1 / 300) / 1e6
        bfloat16 = 17.18 / 0.8 + adam + l0 * rows * (4 / 150 + 1 / 300) / 1e6
        assert parts["float32"] == pytest.approx(float32, rel=1e-3)
        assert parts["bfloat16"] == pytest.approx(bfloat16, rel=1e-3)
        assert parts["limit"] == min(parts["float32"], parts["bfloat16"]) == parts[better]
        assert parts["limit"] == pytest.approx(parts["product"] + parts["adam"] + parts["gathers"])
        nested = train_limit.limit_ms(rates, 4096, 512, 4096, l0, n_prefixes=3)
        assert nested["limit"] - parts["limit"] == pytest.approx(2 * 2 * rows / 40e6)


def test_probe_measures_every_rate():
    probe = train_limit.Probe(64, 16, 32, per_row=4)
    probe.run()
    probe.run()
    rates = probe.rates()
    assert rates.keys() >= {"mm_gflops", "bf16_gflops", "stream_gbs", "gather_gbs", "near_gbs"} and all(
        value > 0 for value in rates.values()
    )
    assert all(len(values) == 2 for values in probe.seconds.values())


def test_tables_quote_ratios_within_rounds():
    # A burst slows both sides of the last round tenfold: the ratio stays 4.
    assert benchmark.ratio([4.0, 4.0, 40.0], [1.0, 1.0, 10.0]) == "4.0"
    assert benchmark.ratio([2.0, 3.0, 4.0, 5.0, 6.0], [1.0] * 5) == "4.0 [2.5, 5.5]"
    limit = {"product": 1.0, "adam": 1.0, "gathers": 1.0, "limit": 3.0}
    item = {"architecture": "standard", "l0": 60.0, "limit": limit}
    mine = {"name": "ours", "family": "mechint", "l0_wanted": "60", "seconds": [0.010, 0.020]}
    from_file = {"name": "ours, rows from the file", "family": "mechint", "l0_wanted": "60", "seconds": [0.02, 0.04]}
    slow = {"name": "SAELens", "family": "saelens", "l0_wanted": "any", "seconds": [0.080, 0.160]}
    original = {"name": "original loop", "family": "original", "l0_wanted": "any", "seconds": [0.120, 0.240]}
    report = {
        "shape": {"d_in": 8, "d_sae": 16, "batch_size": 100},
        "rates": {"mm_gflops": 1.0},
        "machine": {"cpu": "x", "threads": 1, "torch": "2"},
        "contenders": [item | values for values in (mine, from_file, slow, original)],
    }
    rows = benchmark.tables(report).splitlines()
    assert next(row for row in rows if "SAELens" in row).endswith("| 833 | 8.0 |")
    assert next(row for row in rows if "original" in row).endswith("| 6.0 |")  # against rows from the file
    assert next(row for row in rows if row.startswith("| ours | 60 | 3.0")).endswith("| 30% |")


def test_a_turn_times_steps_and_not_the_first(monkeypatch: pytest.MonkeyPatch):
    clock = SimpleNamespace(now=0.0)

    def step(number: int) -> None:
        clock.now += 5.0 if number == 0 else 0.1

    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: clock.now)
    contender = SimpleNamespace(step=step)
    assert benchmark.take_turn(contender, 0) == pytest.approx(0.1)


def test_settings_table_compares_with_the_default():
    seconds = {"default": {"SAELens": [0.2, 0.4, 0.4]}, "malloc": {"SAELens": [0.1, 0.2, 0.2]}}
    lines = train_settings.table(seconds).splitlines()
    assert lines[-1] == "| malloc | 100 / 200 (2.00x) |"


def test_whole_run_schedule_is_the_one_that_train_uses():
    from mechint.train.schedule import learning_rate

    for step in (0, 1, 149, 150, 151, 1500, 2999):
        wanted = learning_rate(step, peak=train_whole.LR, warmup_steps=150, steps=3000)
        assert train_whole.learning_rate(step, 3000) == pytest.approx(wanted)


# --- the peers' environment -------------------------------------------------------------------------------------------


def test_constraints_keep_the_repositorys_pins():
    text = peers.constraints("# ours\nscipy==1.0\nTorch_x==2\n")
    lines = text.splitlines()
    assert "scipy==1.0" in lines and not any(line.startswith("scipy==1.1") for line in lines)
    assert "nltk==3.10.4" in lines and len(lines) == len(set(lines))


def test_environment_is_made_anew_when_a_pin_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("constraints.txt", "pyproject.toml"):
        (tmp_path / name).write_text("a==1\n")
    before = peers.fingerprint(tmp_path)
    (tmp_path / "constraints.txt").write_text("a==2\n")
    assert peers.fingerprint(tmp_path) != before
    folder = tmp_path / "venv"
    (folder / "bin").mkdir(parents=True)
    (folder / ".ready").write_text(peers.fingerprint())
    monkeypatch.setattr(peers.subprocess, "run", lambda *_, **__: pytest.fail("installed again"))
    assert peers.ensure(folder) == folder / "bin" / "python"


@pytest.mark.skipif(importlib.util.find_spec("sae_lens") is None, reason="the peers are not in this environment")
@pytest.mark.parametrize("family", ["saelens", "dictionary_learning"])
def test_peers_train(family: str):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 32, generator=generator) @ torch.randn(32, 32, generator=generator)
    trainee = peer_trainers.FAMILIES[family](
        peer_trainers.Recipe("topk", 32, 128, 60, 256, 1e-2, 8, lr_warmup=3, decay=10)
    )

    def error() -> float:
        with torch.no_grad():
            return float((trainee.decode(trainee.encode(x)) - x).square().sum() / x.square().sum())

    before = error()
    for _ in range(60):
        trainee.step(x[torch.randperm(len(x), generator=generator)])
    assert error() < 0.5 * before
    with torch.no_grad():
        assert float((trainee.encode(x) > 0).sum(dim=1).float().max()) <= 8
