"""Rows from disk and from a model that runs: the same contract, exact positions, each row once a pass."""

import json
import random
from pathlib import Path

import pytest
import torch
from collecting import collect_quietly, one_thread, texts_fixture  # noqa: F401  (fixtures)
from conftest import HOOK

from mechint.config import CollectConfig
from mechint.data import open_activations
from mechint.data.batches import CounterBatches, make_batches
from mechint.data.source import Batch, Live, Source, Stored
from mechint.errors import MechintError
from mechint.models import load_model

HOOKS = (HOOK, "blocks.1.hook_resid_post")


@pytest.fixture(scope="module")
def config(tiny_neox_dir: Path, texts_file: Path, tmp_path_factory: pytest.TempPathFactory) -> CollectConfig:
    output = tmp_path_factory.mktemp("acts") / "acts"
    config = CollectConfig(model=str(tiny_neox_dir), dataset=str(texts_file), output=output, hook=HOOKS, device="cpu",
                           num_texts=50, checkpoint_every=4)  # fmt: skip
    collect_quietly("--model", tiny_neox_dir, "--dataset", texts_file, "--output", output, "--hook", *HOOKS,
                    "--num-texts", 50, "--checkpoint-every", 4, "--device", "cpu")  # fmt: skip
    return config


@pytest.fixture(scope="module")
def model(config: CollectConfig):
    return load_model(config.model, device="cpu", hook_name=HOOK)


def same(one: Batch, other: Batch) -> bool:
    columns = (torch.equal(getattr(one, name), getattr(other, name)) for name in ("tokens", "text_ids", "positions"))
    rows = (torch.equal(one.activations[hook], other.activations[hook]) for hook in HOOKS)
    return list(one.activations) == list(other.activations) and all(columns) and all(rows)


def places(batch: Batch) -> list[tuple[int, int]]:
    return list(zip(batch.text_ids.tolist(), batch.positions.tolist(), strict=True))


@pytest.mark.parametrize("buffer_rows", [2, 60, 150, 10**6])
@pytest.mark.parametrize("batch_size", [1, 13])
def test_each_pass_gives_each_row_of_a_store_once(config: CollectConfig, model, buffer_rows: int, batch_size: int):
    live = Live(config, batch_size=batch_size, buffer_rows=buffer_rows, seed=3, model=model)
    assert isinstance(live, Source) and live.hook_names == HOOKS and live.d_in == dict.fromkeys(HOOKS, 32)
    stores = {hook: open_activations(config.output / hook) for hook in HOOKS}
    n_rows = stores[HOOK].n_rows
    row_of = {
        place: row
        for row, place in enumerate(zip(stores[HOOK].text_ids.tolist(), stores[HOOK].positions.tolist(), strict=True))
    }
    assert len(row_of) == n_rows
    order: list[int] = []
    while len(order) < 3 * n_rows:
        batch = live.next_batch()
        rows = torch.tensor([row_of[place] for place in places(batch)])
        assert torch.equal(batch.tokens, stores[HOOK].tokens[rows])
        for hook, store in stores.items():
            assert batch.activations[hook].dtype == torch.float32
            assert torch.equal(batch.activations[hook], store.rows(rows))
        order += rows.tolist()
    passes = [order[start : start + n_rows] for start in (0, n_rows, 2 * n_rows)]
    for one in passes:
        assert sorted(one) == list(range(n_rows))
    assert passes[0] != passes[1] and passes[0] != sorted(passes[0])
    live.close()


def test_rows_are_mixed_beyond_their_chunk(config: CollectConfig, model):
    """Of a chunk's rows half come a period later, among those of the next; a large buffer mixes everything."""
    live = Live(config, batch_size=40, buffer_rows=120, model=model)
    first = [text for text, _ in places(live.next_batch())]
    later = [text for _ in range(2) for text, _ in places(live.next_batch())]
    assert set(first) & set(later), "late rows of the first texts"
    whole = Live(config, batch_size=100, buffer_rows=10**6, model=model)
    texts = [text for text, _ in places(whole.next_batch())]
    assert min(texts) < 15 and max(texts) > 35
    live.close()
    whole.close()


@pytest.mark.parametrize("buffer_rows", [2, 90, 10**6])
def test_it_goes_back_to_any_position_exactly(config: CollectConfig, model, buffer_rows: int):
    live = Live(config, batch_size=17, buffer_rows=buffer_rows, seed=5, model=model)
    positions, batches = [], []
    for _ in range(120):  # more than two passes
        positions.append(json.loads(json.dumps(live.position)))
        batches.append(live.next_batch())
    assert [position["step"] for position in positions] == list(range(120))
    assert positions[-1]["pass"] >= 2
    rng = random.Random(buffer_rows)
    steps = [0, 1, 119, *(rng.randrange(120) for _ in range(8))]
    for step in steps:
        live.seek(positions[step])
        assert live.position["step"] == step
        for after in range(step, min(step + 3, 120)):
            assert same(live.next_batch(), batches[after]), (step, after)
    other = Live(config, batch_size=17, buffer_rows=buffer_rows, seed=5, model=model)  # another process, say
    for step in steps:
        other.seek(positions[step] if step % 2 else {"step": step})
        assert same(other.next_batch(), batches[step]), step
    different = Live(config, batch_size=17, buffer_rows=buffer_rows, seed=6, model=model)
    assert not same(different.next_batch(), batches[0])
    for source in (live, other, different):
        source.close()


def test_going_to_a_position_runs_two_chunks_only(config: CollectConfig, model, monkeypatch: pytest.MonkeyPatch):
    from mechint.data import source

    live = Live(config, batch_size=10, buffer_rows=60, model=model)
    for _ in range(30):
        live.next_batch()
    position = live.position
    real, blocks = source.run_block, []
    monkeypatch.setattr(source, "run_block", lambda *args, **more: blocks.append(args[2].n_rows) or real(*args, **more))
    fresh = Live(config, batch_size=10, buffer_rows=60, model=model)
    for where in (position, {"step": 30}):
        blocks.clear()
        fresh.seek(where)
        largest = max(len(range(4)) * 30, 1)
        assert 0 < sum(blocks) <= 60 + 2 * largest
        assert same(fresh.next_batch(), live.next_batch())
        live.seek(position)
    fresh.close()
    live.close()


def test_stored_gives_the_batches_that_training_has_always_had(config: CollectConfig):
    stores = [open_activations(config.output / hook) for hook in HOOKS]
    n_rows = stores[0].n_rows
    for order in ("counter", "torch"):
        stream = make_batches(order, torch.arange(n_rows), 19, 7)
        source = Stored(stores, make_batches(order, torch.arange(n_rows), 19, 7))
        assert isinstance(source, Source) and source.hook_names == HOOKS
        batches = []
        for step in range(6):
            assert source.position == {"step": step}
            batches.append(source.next_batch())
            indices = stream.indices(step)
            for hook, store in zip(HOOKS, stores, strict=True):
                assert torch.equal(batches[-1].activations[hook], store.rows(indices))
            assert torch.equal(batches[-1].tokens, stores[0].tokens[indices])
        for step in (4, 0, 5, 2):
            source.seek({"step": step})
            assert same(source.next_batch(), batches[step])


def test_what_the_rows_are_is_known(config: CollectConfig, model):
    live = Live(config, batch_size=4, model=model)
    stored = Stored([open_activations(config.output / hook) for hook in HOOKS], CounterBatches(torch.arange(4), 2, 0))
    for hook in HOOKS:
        for key in (
            "hook_name",
            "layer",
            "model_sha256",
            "tokenizer_sha256",
            "processing",
            "prepend_bos",
            "dataset_name",
        ):
            assert live.info[hook][key] == stored.info[hook][key]
        assert live.info[hook]["settings"] == stored.info[hook]["settings"]
    live.close()


def test_stores_of_other_rows_are_no_one_source(config: CollectConfig, tmp_path: Path):
    other = collect_quietly("--model", config.model, "--dataset", config.dataset, "--output", tmp_path / "other",
                            "--num-texts", 49, "--device", "cpu")  # fmt: skip
    batches = CounterBatches(torch.arange(4), 2, 0)
    with pytest.raises(MechintError, match="do not hold rows of the same tokens"):
        Stored([open_activations(config.output / HOOK), open_activations(other)], batches)
    bare = tmp_path / "bare.pt"
    torch.save(torch.ones(5, 32), bare)
    batch = Stored([open_activations(bare)], batches).next_batch()
    assert batch.tokens is None and batch.activations[str(bare)].shape == (2, 32)


def test_mistakes(config: CollectConfig, model, tmp_path: Path):
    for wrong in ({"batch_size": 0}, {"batch_size": 3, "buffer_rows": 1}):
        with pytest.raises(MechintError, match="there must be at least 1 and 2"):
            Live(config, model=model, **wrong)
    texts = tmp_path / "t.txt"
    texts.write_text("the cat sat\nthe dog ran far away\n" * 3)
    live = Live(config.with_overrides(dataset=str(texts)), batch_size=3, buffer_rows=4, model=model)
    live.next_batch()
    position = live.position
    texts.write_text("the cat sat\n" * 9)
    with pytest.raises(MechintError, match="have changed since this position"):
        Live(config.with_overrides(dataset=str(texts)), batch_size=3, buffer_rows=4, model=model).seek(position)
    with pytest.raises(MechintError, match="were changed while they are in use"):
        for _ in range(10):
            live.next_batch()
    texts.write_text("\n\n")
    with pytest.raises(MechintError, match="has no text"):
        Live(config.with_overrides(dataset=str(texts)), batch_size=3, model=model).next_batch()


def test_lower_precision_is_held_as_computed(config: CollectConfig):
    live = Live(config.with_overrides(dtype="bfloat16"), batch_size=64, buffer_rows=100)
    batch = live.next_batch()
    rows = batch.activations[HOOK]
    assert rows.dtype == torch.float32 and torch.equal(rows, rows.bfloat16().float())
    live.close()
