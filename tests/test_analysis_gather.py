"""One pass over activations: every table against a dense reference, by every way of getting the entries; its files."""

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mechint.analysis import GatherSettings, Latents, bin_edges, gather, load_latents, load_or_gather, save_latents
from mechint.analysis import entries as entries_module
from mechint.analysis.cofiring import RowSample
from mechint.analysis.entries import active_entries
from mechint.analysis.tables import Tables, mixed
from mechint.data import open_activations
from mechint.errors import MechintError
from mechint.kernels import entry_finder
from mechint.runs import Run
from mechint.sae import SAE, build_sae, load_sae, save_checkpoint
from tests.small_run import make_small_run
from tests.test_analysis import write_store

ARCHITECTURES = ("standard", "topk", "jumprelu", "gated", "batchtopk")


def make_sae(architecture: str, d_in: int, d_sae: int, seed: int = 0) -> SAE:
    options = {"k": 5} if "topk" in architecture else {}
    generator = torch.Generator().manual_seed(seed)
    sae = build_sae(architecture, d_in, d_sae, generator=generator, options=options)
    with torch.no_grad():
        for name in sae.latent_offsets():
            sae.get_parameter(name).copy_(torch.rand(d_sae, generator=generator) - 1.7)
        if architecture == "jumprelu":
            sae.get_parameter("threshold").copy_(torch.rand(d_sae, generator=generator) * 0.5)
        sae.b_dec.normal_(generator=generator)
    return sae.saved_form() if architecture == "batchtopk" else sae


def rows(n: int, d_in: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(n, d_in, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["sparse", "dense"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "dense":
        monkeypatch.setattr(entries_module, "entry_finder", lambda sae: None)
    yield request.param


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_entries_are_those_of_encode(architecture: str, way: str) -> None:
    sae, x = make_sae(architecture, 24, 96), rows(700, 24)
    expected = sae.encode(x).detach()
    got = torch.zeros_like(expected)
    taken = []
    for entries in active_entries(sae, x, batch_size=300):
        r, c, v = entries.flat()
        got[torch.from_numpy(r + entries.row), torch.from_numpy(c).long()] = torch.from_numpy(v)
        taken.append(entries.chunk)
        assert (np.diff(r * 1000 + c) > 0).all()  # row by row, ascending latents
        some = np.array([3, 5, 256, 299]) if entries.n_rows == 300 else np.array([0])
        assert all(np.array_equal(a, b[np.isin(r, some)]) for a, b in zip(entries.flat(some), (r, c, v), strict=True))
    assert (taken == [256, 256, 256]) == (way == "sparse")  # chunks of the kernel, or whole batches
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert 0.01 < float((expected > 0).float().mean()) < 0.5


def test_the_kernel_is_left_where_it_would_be_wrong() -> None:
    sae = make_sae("jumprelu", 8, 32)
    assert entry_finder(sae) is not None
    with torch.no_grad():
        sae.get_parameter("threshold")[3] = -0.1  # lets negative values pass
    assert entry_finder(sae) is None
    assert entry_finder(make_sae("standard", 8, 8)) is None  # too few for its vectors
    assert entry_finder(make_sae("standard", 8, 32).double()) is None


def test_a_dense_batch_is_encoded_densely() -> None:
    sae, x = make_sae("standard", 8, 32), rows(64, 8)
    with torch.no_grad():
        sae.b_enc.fill_(10.0)
    (entries,) = active_entries(sae, x)
    assert len(entries.flat()[0]) == 64 * 32


def test_nan_is_refused_and_its_row_named(way: str) -> None:
    sae, x = make_sae("standard", 8, 32), rows(64, 8)
    x[50, 3] = torch.nan
    with pytest.raises(MechintError, match="row 50 "):
        list(active_entries(sae, x, batch_size=16))
    with pytest.raises(MechintError, match="7 wide.*expects 8"):
        gather(sae, rows(5, 7))


def reference(feature_acts: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Strongest positive values and rows, equal ones by row."""
    order = feature_acts.sort(dim=0, descending=True, stable=True)
    values, rows = order.values[:k].T.clone(), order.indices[:k].T.clone()
    rows[values <= 0] = -1
    values[values <= 0] = -torch.inf
    return values, rows


def grid_case(seed: int, n: int, d_sae: int = 24) -> tuple[SAE, torch.Tensor]:
    """Whole numbers, so that values are exact and ties common; latent 0 never fires."""
    generator = torch.Generator().manual_seed(seed)
    sae = build_sae("standard", 3, d_sae, generator=generator)
    with torch.no_grad():
        sae.W_enc.copy_(torch.randint(-2, 3, (3, d_sae), generator=generator))
        sae.b_enc.copy_(torch.randint(-4, 1, (d_sae,), generator=generator))
        sae.b_enc[0] = -100
    return sae, torch.randint(-2, 3, (n, 3), generator=generator).float()


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10_000), n=st.integers(1, 200), batch_size=st.integers(1, 210), k=st.integers(1, 12),
    n_sample=st.integers(1, 40),
)  # fmt: skip
def test_tables_equal_a_dense_reference(seed: int, n: int, batch_size: int, k: int, n_sample: int) -> None:
    sae, x = grid_case(seed, n)
    chosen = GatherSettings(k=k, n_sample=n_sample, n_strata=3, n_examples=2, n_partners=4, seed=seed)
    latents = gather(sae, x, chosen, batch_size=batch_size)
    feature_acts = sae.encode(x).detach()
    fired = feature_acts > 0
    assert torch.equal(latents.counts, fired.sum(dim=0)) and latents.counts[0] == 0
    assert torch.allclose(latents.mean, feature_acts.sum(dim=0) / fired.sum(dim=0).clamp_min(1))
    assert torch.equal(latents.max, feature_acts.amax(dim=0))
    width = min(k, n)
    values, top = reference(feature_acts, k)
    assert torch.equal(latents.top_values[:, :width], values) and torch.equal(latents.top_rows[:, :width], top)
    assert (latents.top_rows[:, width:] == -1).all() and torch.isneginf(latents.top_values[:, width:]).all()
    assert latents.l0 == pytest.approx(float(fired.sum()) / n) and torch.equal(
        latents.dead(), (~fired.any(0)).nonzero()[:, 0]
    )
    edges = torch.from_numpy(bin_edges())
    for latent in range(sae.d_sae):
        bins = torch.bucketize(feature_acts[fired[:, latent], latent], edges, right=True) - 1
        assert torch.equal(latents.histogram[latent].long(), torch.bincount(bins, minlength=len(edges) - 1))
        check_strata(latents, latent, feature_acts[:, latent], chosen)
    check_partners(latents, fired, chosen)


def check_strata(latents: Latents, latent: int, acts: torch.Tensor, chosen: GatherSettings) -> None:
    n_fired = int((acts > 0).sum())
    found, values = latents.stratum_rows[latent], latents.stratum_values[latent]
    shown = found[found >= 0]
    assert len(shown) == len(set(shown.tolist())) and bool((acts[shown] == values[found >= 0]).all())
    edges = latents.stratum_edges[latent]
    if n_fired == 0:
        assert (found == -1).all() and edges.isnan().all()
        return
    assert bool((edges.diff() >= 0).all()) and bool((acts[shown] > 0).all())
    for s in range(chosen.n_strata):
        own = values[s][found[s] >= 0]
        assert bool((own >= edges[s]).all() and (own <= edges[s + 1]).all()) and bool((own.diff() <= 0).all())
    n = min(n_fired, chosen.n_sample)
    sizes = [n * (s + 1) // chosen.n_strata - n * s // chosen.n_strata for s in range(chosen.n_strata)]
    assert (found >= 0).sum(dim=1).tolist() == [min(size, chosen.n_examples) for size in sizes]
    if n_fired <= chosen.n_sample:  # the sample is all there is: exact quantiles
        ordered = acts[acts > 0].sort().values
        assert torch.equal(edges[[0, -1]], ordered[[0, -1]])


def check_partners(latents: Latents, fired: torch.Tensor, chosen: GatherSettings) -> None:
    both = fired.T.double() @ fired.double()
    n = both.diagonal()
    jaccard = both / (n[:, None] + n[None, :] - both).clamp_min(1)
    jaccard[both < 5] = -1
    jaccard.fill_diagonal_(-1)
    best = jaccard.sort(dim=1, descending=True, stable=True)
    expected = best.indices[:, : chosen.n_partners].masked_fill(best.values[:, : chosen.n_partners] < 0, -1)
    partners = latents.partners
    assert partners.n_rows == len(fired) and torch.equal(partners.latent, expected)
    for i, j in (expected >= 0).nonzero().tolist():
        other = int(expected[i, j])
        assert float(partners.jaccard[i, j]) == pytest.approx(float(jaccard[i, other]), rel=1e-6)
        assert int(partners.both[i, j]) == int(both[i, other])
        series = torch.stack([fired[:, i], fired[:, other]]).double()
        phi = float(torch.corrcoef(series)[0, 1]) if 0 < n[i] < len(fired) and 0 < n[other] < len(fired) else 0.0
        assert float(partners.phi[i, j]) == pytest.approx(phi, abs=1e-5)


def test_numpy_gives_what_the_compiled_loops_give() -> None:
    sae, x = make_sae("standard", 24, 96), rows(900, 24)
    tables = [Tables(96, n_top=7, n_sample=9, histogram=True, seed=3, compiled=compiled) for compiled in (True, False)]
    assert tables[0]._loops is not None and tables[1]._loops is None
    sample = RowSample(96, seed=3)
    for entries in active_entries(sae, x, batch_size=256):
        for table in tables:
            table.add(entries)
        sample.add(entries)
    for name in ("counts", "sums", "histogram"):
        assert np.array_equal(getattr(tables[0], name), getattr(tables[1], name)), name
    for one, other in zip(tables[0].top() + tables[0].sample(), tables[1].top() + tables[1].sample(), strict=True):
        assert np.array_equal(one, other)
    compiled, plain = (sample.partners(6, compiled=compiled) for compiled in (True, False))
    assert (compiled.latent >= 0).any()
    assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(compiled, plain, strict=True))


def test_the_result_depends_neither_on_batches_nor_on_threads() -> None:
    sae, x = make_sae("standard", 24, 96), rows(3000, 24)
    before = torch.get_num_threads()
    found = []
    for threads, batch_size in ((1, 4096), (2, 4096), (2, 177)):
        torch.set_num_threads(threads)
        found.append(gather(sae, x, batch_size=batch_size))
    torch.set_num_threads(before)
    for other in found[1:]:
        assert torch.equal(found[0].counts, other.counts) and torch.equal(found[0].top_rows, other.top_rows)
        assert torch.equal(found[0].stratum_rows, other.stratum_rows)
        assert torch.equal(found[0].partners.latent, other.partners.latent)


def test_samples_are_even_and_follow_the_seed() -> None:
    """A latent that always fires: each row is as likely as any other to be among its random rows."""
    sae, x = make_sae("standard", 4, 16), rows(400, 4)
    with torch.no_grad():
        sae.b_enc.fill_(50.0)
    hits = np.zeros(400)
    for seed in range(20):
        tables = Tables(16, n_top=1, n_sample=40, seed=seed)
        for entries in active_entries(sae, x):
            tables.add(entries)
        drawn = tables.sample()[1]
        assert all(len(set(line)) == 40 for line in drawn.tolist())
        hits += np.bincount(drawn.reshape(-1), minlength=400)
    # 20 seeds x 16 latents x 40 of 400 rows: 32 hits a row, standard deviation 5.4
    assert hits.sum() == 20 * 16 * 40 and hits.min() > 10 and hits.max() < 60
    assert abs(hits[:200].mean() - hits[200:].mean()) < 2
    first, again, other = (gather(sae, x, GatherSettings(seed=seed)).stratum_rows for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_row_sample_is_bounded_and_the_same_for_any_batches() -> None:
    sae, x = make_sae("standard", 24, 96), rows(2000, 24)
    kept = []
    for batch_size in (2000, 123):
        sample = RowSample(96, max_entries=3000)
        total = 0
        for entries in active_entries(sae, x, batch_size=batch_size):
            sample.add(entries)
            total += len(entries.flat()[0])
            assert sample.n_entries <= 3000
        assert total > 6000 and sample.n_entries > 1000
        kept.append(np.concatenate([part[0] for part in sample.parts]))
    assert np.array_equal(*kept)
    n = len(kept[0])
    assert n == int((mixed(np.arange(2000), -1, 0) < sample.limit).sum()) and sample.partners(3).n_rows == n


@pytest.mark.parametrize("change", [{"k": 0}, {"n_strata": 0}, {"seed": -1}])
def test_settings_that_make_no_sense(change: dict[str, int]) -> None:
    with pytest.raises(MechintError, match=next(iter(change))):
        gather(make_sae("standard", 4, 16), rows(9, 4), GatherSettings(**change))


def test_first_rows_can_be_left_out(tmp_path: Path, way: str) -> None:
    """As if the rows at position 0 had not been stored, with the numbers that rows have."""
    acts = write_store(tmp_path / "store", [30, 500, 70], first_position=0, d_in=24)
    sae, x = make_sae("standard", 24, 96), acts.tensor()
    kept = torch.ones(600, dtype=torch.bool)
    kept[[0, 30, 530]] = False
    chosen = GatherSettings(k=6, n_sample=600)
    found = gather(sae, acts, GatherSettings(k=6, n_sample=600, skip_first=True), batch_size=300)
    expected = gather(sae, x[kept], chosen)
    whole = gather(sae, acts, chosen)
    numbers = kept.nonzero().flatten()
    assert found.n_rows == 597 and torch.equal(found.counts, expected.counts)
    assert not torch.equal(found.counts, whole.counts)
    assert torch.allclose(found.mean, expected.mean, atol=1e-6) and torch.equal(found.histogram, expected.histogram)
    rows = torch.where(expected.top_rows >= 0, numbers[expected.top_rows.clamp_min(0)], -1)
    assert torch.equal(found.top_rows, rows)
    assert found.partners.n_rows == 597 and torch.equal(found.partners.latent, expected.partners.latent)
    assert torch.allclose(found.partners.phi, expected.partners.phi)
    with pytest.raises(MechintError, match="skip_first"):
        gather(sae, x, GatherSettings(skip_first=True))


def test_rows_shown_and_latent_out_of_range() -> None:
    latents = gather(*grid_case(3, 100), GatherSettings(k=4, n_sample=10, n_strata=2, n_examples=2))
    assert latents.rows_shown(0) == []
    latent = int(latents.counts.argmax())
    shown = latents.rows_shown(latent)
    assert shown[:4] == latents.top_rows[latent].tolist() and len(shown) == len(set(shown)) and -1 not in shown
    for bad in (-1, 24):
        with pytest.raises(MechintError, match=f"latent {bad} .*0 to 23"):
            latents.rows_shown(bad)


def test_a_store_is_read_in_pieces_of_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    acts = write_store(tmp_path / "store", [300, 200], d_in=8)
    x, opened = acts.tensor(), []
    monkeypatch.setattr(entries_module, "MAPPED_BYTES", 100 * 8 * 4)
    real = entries_module.open_activations
    monkeypatch.setattr(entries_module, "open_activations", lambda path: opened.append(path) or real(path))
    assert torch.equal(torch.cat(list(entries_module._stored_batches(acts, 40))), x)
    assert len(opened) == 5  # every third batch
    (tmp_path / "store").rename(tmp_path / "moved")  # what is open stays readable
    assert torch.equal(torch.cat(list(entries_module._stored_batches(acts, 40))), x)


def test_the_benchmark_measures_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(__file__).parents[1] / "benchmarks" / "contexts.py"
    spec = importlib.util.spec_from_file_location("benchmarks_contexts", path)
    assert spec is not None and spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    monkeypatch.setattr(benchmark, "N_DIRECTIONS", 50)
    for case, l0 in (("standard", 12.0), ("jumprelu", 12.0), ("topk", 9.0)):
        found = benchmark.one(tmp_path / "store", case, l0, 3000, 32, 128)
        assert found["l0"] == pytest.approx(l0, rel=0.1) and found["seconds"] > 0 and found["VmHWM"] > 0
    assert open_activations(tmp_path / "store").n_rows == 3000
    sae, x = make_sae("standard", 24, 96), rows(500, 24)
    best = benchmark.plain_way(sae, x, 7)
    assert torch.allclose(best.T, gather(sae, x, GatherSettings(k=7)).top_values.clamp_min(0), atol=1e-5)


# --- in a run directory -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_small_run(tmp_path_factory.mktemp("gather"))


@pytest.mark.slow
def test_a_run_keeps_what_was_gathered_until_it_is_stale(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    module = __import__("mechint.analysis.latents", fromlist=["gather"])
    real = module.gather
    monkeypatch.setattr(module, "gather", lambda *args, **kwargs: calls.append(1) or real(*args, **kwargs))
    files = [run.path / "latents.safetensors", run.path / "latents.json"]
    first = load_or_gather(run)
    assert len(calls) == 1 and all(file.is_file() for file in files)
    again = load_or_gather(run.path)
    assert len(calls) == 1
    for name in ("counts", "mean", "top_rows", "stratum_edges", "histogram"):
        assert torch.equal(getattr(first, name).nan_to_num(), getattr(again, name).nan_to_num())
    assert torch.equal(first.partners.phi, again.partners.phi) and first.n_rows == again.n_rows
    acts = open_activations(run.activations_path())
    dense = load_sae(run.checkpoint_path).encode(acts.tensor()[:2000]).detach()
    assert torch.equal(gather(load_sae(run.checkpoint_path), acts.tensor()[:2000]).counts, (dense > 0).sum(dim=0))

    for number, spoil in enumerate(
        [
            lambda: files[0].write_bytes(files[0].read_bytes()[:-100]),  # cut
            lambda: files[0].unlink(),
            lambda: files[1].write_text("{"),
            lambda: files[1].write_text(json.dumps(json.loads(files[1].read_text()) | {"checkpoint_sha256": "0"})),
            lambda: files[1].write_text(json.dumps(json.loads(files[1].read_text()) | {"activations_sha256": "0"})),
            lambda: files[1].write_text(json.dumps(json.loads(files[1].read_text()) | {"format_version": 99})),
        ]
    ):
        spoil()
        assert torch.equal(load_or_gather(run).counts, first.counts)
        assert len(calls) == 2 + number, number
    load_or_gather(run, settings=GatherSettings(k=3))
    assert len(calls) == 8


def test_a_folder_of_somebody_else_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sae, x = grid_case(1, 50)
    (tmp_path / "config.json").write_text("{}")
    save_checkpoint(sae, tmp_path / "checkpoint.pt")
    torch.save(x, tmp_path / "acts.pt")
    module = __import__("mechint.analysis.latents", fromlist=["save_latents"])

    def refuse(*args: object) -> None:
        raise MechintError("you may not write there")

    monkeypatch.setattr(module, "save_latents", refuse)
    with pytest.warns(UserWarning, match="you may not write there"):
        found = load_or_gather(tmp_path, activations=open_activations(tmp_path / "acts.pt"))
    assert torch.equal(found.counts, gather(sae, x).counts) and not (tmp_path / "latents.json").exists()


def test_files_are_whole_or_refused(tmp_path: Path) -> None:
    latents = gather(*grid_case(1, 50))
    with pytest.raises(MechintError, match="not found"):
        load_latents(tmp_path)
    save_latents(latents, tmp_path, {"checkpoint_sha256": "a", "activations_sha256": "b"})
    loaded, record = load_latents(tmp_path)
    assert torch.equal(loaded.top_values, latents.top_values) and loaded.settings == latents.settings
    assert record["checkpoint_sha256"] == "a" and len(record["histogram_edges"]) == latents.histogram.shape[1] + 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latents.json", "latents.safetensors"]
    (tmp_path / "latents.safetensors").write_bytes(b"x")
    with pytest.raises(MechintError, match="gather again"):
        load_latents(tmp_path)


def test_an_empty_run_says_what_finishes_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(MechintError, match="--resume"):
        load_or_gather(tmp_path)
    with pytest.raises(MechintError, match="no config.json"):
        load_or_gather(tmp_path / "..")
