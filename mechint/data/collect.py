"""Collect activations: texts in, a store (or one `.pt`) out, a shard at a time.

A shard holds a window of consecutive texts, so what is in it follows from its number alone: a killed collection goes on
with the shards that are missing, and several processes (`torchrun`) take every n-th. Either way the files are the same.
"""

import contextlib
import functools
import itertools
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mechint.config import CollectConfig, SAETrainConfig, layer_of_hook
from mechint.data import store_write
from mechint.data.ahead import Behind, ahead
from mechint.data.contexts import Context, contexts_of
from mechint.data.documents import Document
from mechint.data.forecast import forecast, plural, shard_note, treatment
from mechint.data.local_text import is_local
from mechint.data.norms import report_norms
from mechint.data.pt_file import assemble_pt
from mechint.data.ranks import Ranks, launcher, process_group
from mechint.data.store import shards_folder, sidecar_path
from mechint.data.text import BUILTIN, TextSource, no_texts, open_texts
from mechint.data.tokens import TextsRead, read_texts
from mechint.data.watch import RankLost
from mechint.data.windows import Block, WindowRows, plan_block, run_block
from mechint.errors import MechintError
from mechint.models.language_model import DTYPES, LanguageModel, load_model
from mechint.models.resolve import BUILTIN_MODELS, resolve_model
from mechint.provenance import check_output_path, get_git_commit, package_versions, read_json, remove_abandoned

# The keys of the original's config.json, all of which its sidecars hold.
_ORIGINAL_KEYS = [
    *("activation_dim", "activations_path", "batch_size", "dataset_name", "dataset_split", "device", "epochs"),
    *("eval_batch_size", "expansion", "hook_name", "l1_lambda", "lambda_warmup_steps", "layer", "learning_rate"),
    *("legacy_layout", "max_chars", "max_grad_norm", "model_name", "model_source", "num_texts", "run_name"),
    *("runs_root", "seed", "val_fraction", "warmup_steps"),
]
ORIGINAL_CHECKPOINT_EVERY = 5000  # texts


@dataclass(frozen=True)
class Collected:
    """What a collection left, and how fast this process was. `already`: it was there before, nothing was done.

    `stores` has the path, the metadata path and the fields of the result at each hook; `path`, `metadata_path` and
    `info` are those of the first.
    """

    stores: dict[str, tuple[Path, Path, dict[str, Any]]]
    n_tokens: int = 0
    seconds: float = 0.0
    rank: int = 0
    already: bool = False

    @property
    def path(self) -> Path:
        return next(iter(self.stores.values()))[0]

    @property
    def metadata_path(self) -> Path:
        return next(iter(self.stores.values()))[1]

    @property
    def info(self) -> dict[str, Any]:
        return next(iter(self.stores.values()))[2]


@dataclass(frozen=True)
class _Target:
    """One hook and where its vectors go.

    `info` is there if the result is already whole. Else `asked` is what an earlier try recorded, and `finished` the
    records of the shards that it left, by number.
    """

    hook: str
    output: Path
    settings: dict[str, Any]
    info: dict[str, Any] | None
    asked: dict[str, Any] | None
    finished: dict[int, dict[str, Any]]

    @property
    def folder(self) -> Path:
        return shards_folder(self.output)


def collect_activations(
    config: CollectConfig | SAETrainConfig,
    output_path: str | Path | None = None,
    checkpoint_every: int = ORIGINAL_CHECKPOINT_EVERY,
    *,
    progress: bool = True,
) -> tuple[Path, Path]:
    """Collect what `config` says, or go on where a killed collection stopped. Returns the result's path and that of its
    record (the sidecar of a .pt, the store.json of a store).

    A result that is already whole is left as it is. With `torchrun`, every process calls this.

    Args:
        config: a `SAETrainConfig`, whose model, hook and texts are then collected as the original pipeline did (preset
            mech-int: centred, BOS kept) to its `activations_path`.
        output_path: another place than the config's.
        checkpoint_every: texts a shard, 0 for the default; a `CollectConfig` keeps its own unless this is changed.

    Raises:
        MechintError: any setting, name or file is wrong (before anything is written), the output holds something else
            or was collected with other settings (nothing is touched), the disk is full or the model gave NaN (finished
            shards are kept).
    """
    if isinstance(config, CollectConfig):
        changed = None if checkpoint_every == ORIGINAL_CHECKPOINT_EVERY else checkpoint_every
        asked = config.with_overrides(output=output_path, checkpoint_every=changed)
    else:
        asked = _as_the_original(config, output_path or config.activations_path, checkpoint_every)
    done = collect(asked, progress=progress)
    return done.path, done.metadata_path


def _as_the_original(config: SAETrainConfig, output: str | Path, checkpoint_every: int) -> CollectConfig:
    return CollectConfig.from_dict(
        {
            "preset": "mech-int",
            "model": config.model_name,
            "hook": config.hook_name,  # the layer follows from it
            "dataset": config.dataset_name,
            "split": config.dataset_split,
            "num_texts": config.num_texts,
            "max_chars": config.max_chars,
            "seed": config.seed,
            "device": config.device,
            "output": str(output),
            "checkpoint_every": checkpoint_every,
        }
    )


def collect(
    config: CollectConfig,
    *,
    progress: bool = True,
    on_note: Callable[[str], None] = lambda note: None,
    model: LanguageModel | None = None,
) -> Collected:
    """As `collect_activations`, with what the command reports. `on_note` is given, before the work begins, what is
    read, what will be left out of it, and how much the result will be. `model` is the one that `config` names, if it is
    loaded already."""
    with process_group() as ranks:
        advice = f"finished shards are kept; go on with: {collect_command(config)}"
        if ranks.watch is not None:
            ranks.watch.advice = advice
        try:
            targets = _targets(config, ranks)
            already = all(target.info is not None for target in targets)
            n_tokens, seconds = (0, 0.0) if already else _collect(config, targets, ranks, progress, on_note, model)
            ranks.barrier()
            # the other processes may not see the first one's files yet, where they share a disk over a network
            infos = [_finished_info(target) if ranks.rank == 0 else target.info or {} for target in targets]
            if ranks.rank == 0:
                _check_aligned(targets, infos)
        except RankLost as lost:
            raise RankLost(f"{lost}; {advice}") from lost
        stores = {
            target.hook: (target.output, sidecar_path(target.output), info)
            for target, info in zip(targets, infos, strict=True)
        }
        return Collected(stores, n_tokens, seconds, ranks.rank, already)


def _targets(config: CollectConfig, ranks: Ranks) -> list[_Target]:
    """What is to be collected, checked against what is there; nothing is loaded or written for it."""
    hooks = config.hooks
    if len(hooks) > 1:
        _check_shared_folder(config, ranks)
    targets = []
    for hook in hooks:
        output = config.output / hook if len(hooks) > 1 else config.output
        if not shards_folder(output).exists():
            check_output_path(shards_folder(output))
        settings = settings_at(config, hook, ranks.world_size)
        info = _already_collected(output, settings, ranks)
        asked = None if info else _read_asked(shards_folder(output))
        finished = store_write.finished_shards(shards_folder(output)) if asked else {}
        targets.append(_Target(hook, output, settings, info, asked, finished))
    return targets


def settings_at(config: CollectConfig, hook: str, world_size: int = 1) -> dict[str, Any]:
    """The settings that decide the content of the result at one hook, in one spelling."""
    settings = config.to_dict() | {"hook": hook}
    for name in ("output", "layer", "layers", "preset", "checkpoint_every"):
        del settings[name]
    location = resolve_model(config.model)
    # a built-in name rather than where the package happens to be installed
    settings["model"] = config.model if config.model in BUILTIN_MODELS else location
    settings["texts_per_shard"] = config.texts_per_shard
    if config.dataset not in BUILTIN and not is_local(config.dataset):
        settings["world_size"] = world_size  # a data set on the Hub is split over the processes
    return settings


def _check_shared_folder(config: CollectConfig, ranks: Ranks) -> None:
    """Raise `MechintError` unless the folder for several hooks is free, or holds stores of the same collection only."""
    folder = config.output
    if not folder.exists():
        check_output_path(folder)
        return
    if not folder.is_dir():
        raise MechintError(f"{folder} exists and is not a folder: give another --output")
    if store_write.settings_in(folder) is not None:
        raise MechintError(
            f"{folder} is the store of one hook, and several hooks need a folder with one store each: give another"
            " --output"
        )
    for path in sorted(folder.iterdir()):
        if path.name in config.hooks:  # looked at on its own
            continue
        before = store_write.settings_in(path) if path.is_dir() else None
        if before is None:
            raise MechintError(f"{folder} holds other files ({path.name}): give another --output")
        # the stores in one folder have the same rows
        store_write.check_same(before, settings_at(config, before.get("hook", path.name), ranks.world_size), str(path))


def _already_collected(output: Path, settings: dict[str, Any], ranks: Ranks) -> dict[str, Any] | None:
    """The finished result's fields, if it is there and is what is asked for. Raises if it is something else."""
    metadata = sidecar_path(output)
    if output.suffix == ".pt":
        if output.exists():
            info = read_json(metadata, "sidecar").get("store", {}) if metadata.exists() else {}
            if "settings" not in info:
                raise MechintError(f"{output} exists and is not overwritten: give another --output or move it away")
        elif metadata.exists() and "activation_path" not in read_json(metadata, f"file in the way of {metadata}"):
            raise MechintError(f"{metadata} exists and is no sidecar of activations: give another --output")
        else:
            info = None
    else:
        info = read_json(metadata, "activation store") if metadata.exists() else None
    if info is None:
        store_write.check_place(shards_folder(output), settings)
        return None
    store_write.check_same(info.get("settings", {}), settings, str(output))
    if ranks.rank == 0:
        leftover = shards_folder(output) if output.suffix == ".pt" else output / store_write.PROGRESS
        shutil.rmtree(leftover, ignore_errors=True)
        if output.is_dir():
            remove_abandoned(output)
    return info


def _finished_info(target: _Target) -> dict[str, Any]:
    if target.info is not None:
        return target.info
    found = read_json(sidecar_path(target.output), "activation store")
    return found["store"] if target.output.suffix == ".pt" else found


def _check_aligned(targets: list[_Target], infos: list[dict[str, Any]]) -> None:
    """Raise `MechintError` if the stores of several hooks are of other texts or weights, collected at another time."""
    for target, info in zip(targets, infos, strict=True):
        for key in ("texts_sha256", "model_sha256", "n_rows"):
            if info.get(key) != infos[0].get(key):
                raise _not_aligned(target, targets[0], key)


def _not_aligned(one: _Target, other: _Target, key: str) -> MechintError:
    return MechintError(
        f"{one.output} and {other.output} differ in {key}: texts or weights have changed since one of them was"
        " collected, so their rows are not of the same tokens; remove one and run the same command again"
    )


def _collect(
    config: CollectConfig,
    targets: list[_Target],
    ranks: Ranks,
    progress: bool,
    on_note: Callable[[str], None],
    model: LanguageModel | None,
) -> tuple[int, float]:
    """Make the shards that are missing, and of them the results. Returns the tokens that went through the model, and
    the seconds it took."""
    whole = [target for target in targets if target.info is not None]
    targets = [target for target in targets if target.info is None]
    begun = next((target.asked for target in targets if target.asked), None)
    finished = _finished_at_all(targets)
    source = _open_source(config, begun, finished, ranks)
    try:
        shards = _Shards(config, source, finished, ranks)
        # the commit that it was begun with, if the newest one is another by now
        revision = begun["info"]["model_revision"] if begun else config.model_revision
        model = model or load_hooked(config.with_overrides(device=ranks.device(config.device), model_revision=revision))
        fixed = {"model_sha256": model.weights_sha256(), "texts": source.fingerprint()}
        for target in whole:
            if (target.info or {}).get("model_sha256") != fixed["model_sha256"]:
                raise _not_aligned(target, targets[0], "model_sha256")
        records = [_asked(config, target, source, model, fixed) for target in targets]
        ready = _read_shards(config, model, shards)
        first, notes = next(ready, None), []
        if ranks.rank == 0:
            notes = _forecast(config, first, shards, [record["info"] for record in records])
        ready = ready if first is None else itertools.chain([first], ready)
        with contextlib.ExitStack() as held:
            if ranks.rank == 0:
                if len(config.hooks) > 1:
                    held.enter_context(store_write.only_writer(config.output))
                for target in targets:
                    held.enter_context(store_write.only_writer(target.folder))
                for note in notes:
                    on_note(note)
                for target, record in zip(targets, records, strict=True):
                    store_write.begin_store(target.folder, record)
            ranks.barrier()
            n_tokens, seconds = _write_shards(model, ready, shards, targets, ranks, progress)
            ranks.barrier()
            if ranks.rank == 0:
                for target, record in zip(targets, records, strict=True):
                    _finish(config, target, model, record["info"])
        return n_tokens, seconds
    finally:
        source.close()


def _finished_at_all(targets: list[_Target]) -> dict[int, dict[str, Any]]:
    """The records of the shards that every hook has."""
    first, *others = targets
    return {n: record for n, record in first.finished.items() if all(n in other.finished for other in others)}


def _asked(
    config: CollectConfig, target: _Target, source: TextSource, model: LanguageModel, fixed: dict[str, Any]
) -> dict[str, Any]:
    """What is recorded before the first shard. Raises `MechintError` if it was begun with other texts or weights."""
    if target.asked:
        _check_texts(config, target.asked["fixed"], fixed)
        store_write.check_same(target.asked["fixed"], fixed, str(target.folder))
        info = target.asked["info"]
    else:
        info = store_fields(config, target.hook, target.settings, source, model)
    return {"settings": target.settings, "fixed": fixed, "info": info, "command": collect_command(config)}


def load_hooked(config: CollectConfig) -> LanguageModel:
    """The model that `config` names, with a backend that has all of its hooks."""
    model = load_model(
        config.model,
        device=config.device,
        device_map=config.device_map,
        dtype=config.dtype,
        processing=config.processing,
        backend=config.backend,
        revision=config.model_revision,
    )
    if config.backend == "auto":
        model.choose_backend(*config.hooks)
    for hook in config.hooks:
        model.check_hook(hook)
    return model


def _read_asked(folder: Path) -> dict[str, Any] | None:
    path = store_write.asked_path(folder)
    return read_json(path, "record of an unfinished collection") if path.exists() else None


def _open_source(
    config: CollectConfig, asked: dict[str, Any] | None, finished: dict[int, dict[str, Any]], ranks: Ranks
) -> TextSource:
    """The text source; a data set on the Hub at the commit and position where an unfinished collection stopped."""
    state, revision = None, config.revision
    if asked and asked["info"]["text_source"] == "hub":
        revision = asked["info"]["dataset_revision"]
        mine = ranks.rank
        while mine in finished:
            state = finished[mine]["state"]
            mine += ranks.world_size
    return open_source(config.with_overrides(revision=revision), ranks.rank, ranks.world_size, state)


def open_source(
    config: CollectConfig, rank: int = 0, world_size: int = 1, state: dict[str, Any] | None = None
) -> TextSource:
    """The texts that `config` names, from the beginning or from where the source's `state` was."""
    return open_texts(
        config.dataset,
        config.split,
        revision=config.revision,
        text_field=config.text_field,
        unit=config.unit,
        max_chars=config.max_chars,
        seed=config.seed,
        rank=rank,
        world_size=world_size,
        state=state,
    )


class _Shards:
    """The windows of texts that this process still has to turn into shards.

    The first one is read at once, so that a missing field or an empty source is known before the model is loaded.
    """

    def __init__(self, config: CollectConfig, source: TextSource, finished: dict[int, dict[str, Any]], ranks: Ranks):
        self.source, self.size, self.num_texts = source, config.texts_per_shard, config.num_texts
        self.step = ranks.world_size if source.by_rank else 1
        total = -(-self.num_texts // self.size)
        mine = range(ranks.rank, total, ranks.world_size)
        ended = [number for number, record in finished.items() if record["n_texts"] < self.length(number)]
        if source.by_rank:
            ended = [number for number in ended if number in mine]
            # What lies behind a gap cannot be kept: the stream is read in order from the state before it.
            kept = 0
            while kept < len(mine) and mine[kept] in finished:
                kept += 1
            self.numbers = list(mine[kept:])
        else:
            self.numbers = [number for number in mine if number not in finished]
        if ended:
            self.numbers = [number for number in self.numbers if number < min(ended)]
        self.n_texts = sum(map(self.length, mine))
        self.n_texts_left = sum(map(self.length, self.numbers))
        end = min(ended, default=total)
        done = sum(self.length(number) for number in finished if number < end)
        self.n_texts_missing = min(self.num_texts, end * self.size) - done  # of all processes
        self.finished = finished
        self.first = self._read(self.numbers[0]) if self.numbers else ([], None)
        if self.numbers and self.numbers[0] == 0 and not self.first[0]:
            raise no_texts(config.dataset)

    def length(self, number: int) -> int:
        """How many texts a shard holds, unless the source ends."""
        return min(self.size, self.num_texts - number * self.size)

    def about(self) -> tuple[int, bool]:
        """About how many texts all processes together still have to collect, and whether that is exact."""
        known = self.source.about()
        begun = 0 if not self.numbers else self.numbers[0] // self.step * self.size + len(self.first[0])
        ended = bool(self.numbers) and len(self.first[0]) < self.length(self.numbers[0])
        total = begun if ended else self.num_texts if known is None else min(max(known, begun), self.num_texts)
        done = sum(record["n_texts"] for record in self.finished.values())
        return max(total - done, 0), ended or known is not None and known >= self.num_texts

    def _read(self, number: int) -> tuple[list[Document], dict[str, Any] | None]:
        texts = self.source.read(number // self.step * self.size, self.length(number))
        return texts, self.source.state()

    def __iter__(self) -> Iterator[tuple[int, list[Document], dict[str, Any] | None]]:
        """(number of the shard, its texts, the source's state after them), until the source ends."""
        for number in self.numbers:
            texts, state = self.first if number == self.numbers[0] else self._read(number)
            if texts:
                yield number, texts, state
            if len(texts) < self.length(number):
                return


def store_fields(
    config: CollectConfig, hook: str, settings: dict[str, Any], source: TextSource, model: LanguageModel
) -> dict[str, Any]:
    """The fields of `store.json` that are known before the first shard."""
    return {
        **source.describe(),
        "settings": settings,
        "d_in": model.hook_width(hook),
        "dtype": str(model.hf_model.dtype).removeprefix("torch."),
        "hook_name": hook,
        "layer": layer_of_hook(hook),
        "model_name": config.model,
        "model_source": model.source,
        "model_revision": model.revision,
        "model_sha256": model.weights_sha256(),
        "tokenizer_sha256": model.tokenizer_sha256(),
        "d_vocab": model.d_vocab,
        "processing": config.processing,
        "prepend_bos": config.prepend_bos,
        "keep_bos": config.keep_bos,
        "bos_token_id": model.bos_token_id if config.prepend_bos else None,
        "context_size": context_size(config, model),
        "bos_every_window": config.bos_every_window,
        "pack": config.pack,
        "separator_token_id": model.bos_token_id if config.pack else None,
        "max_chars": config.max_chars,
        "seed": config.seed,
        "device": model.device,
        "backend": model.backend,
        "mechint_version": package_versions().get("mechint"),
        "git_commit": get_git_commit(),
        "versions": package_versions(),
    }


@dataclass(frozen=True)
class _Shard:
    """The texts of a shard, ready for the model."""

    number: int
    block: Block
    record: dict[str, Any]


def block_of(
    config: CollectConfig, model: LanguageModel, documents: Sequence[Document], first_id: int
) -> tuple[TextsRead, Block, dict[str, int]]:
    """Consecutive texts, the first one's number being `first_id`, as they were read, as the model is to read them, and
    the counts of what was done to them."""
    read = read_texts(model, documents, max_chars=config.max_chars, prepend_bos=config.prepend_bos)
    contexts, counts = lay_out(config, model, read, first_id=first_id)
    return read, plan_block(contexts, batch_size=config.batch_size, device=model.device), counts


def _read_shards(config: CollectConfig, model: LanguageModel, shards: _Shards) -> Iterator[_Shard]:
    """Texts to tokens to batches; runs on a thread of its own."""
    for number, documents, state in shards:
        read, block, counts = block_of(config, model, documents, number * config.texts_per_shard)
        record = {
            "n_texts": len(documents),
            "n_tokens": block.n_tokens,
            "texts_sha256": store_write.texts_sha256(read.texts),
            "texts": counts,
            "state": state,
        }
        yield _Shard(number, block, record)


def _write_shard(shard: _Shard, rows: WindowRows, target: _Target) -> None:
    """The rows at one hook to the disk; runs on a thread of its own."""
    norms = rows.checked_norms(target.hook)
    store_write.write_shard(
        target.folder,
        shard.number,
        activations=rows.activations[target.hook],
        tokens=shard.block.tokens,
        text_ids=shard.block.text_ids,
        positions=shard.block.positions,
        norms=norms,
        record=shard.record | {"norms": rows.histograms(target.hook, norms)},
    )


def _check_texts(config: CollectConfig, before: dict[str, Any], now: dict[str, Any]) -> None:
    if before["texts"] != now["texts"]:
        raise MechintError(
            f"the texts of {config.dataset} have changed since {config.output} was begun (names, sizes or times of"
            " files): bring them back to go on, or give another --output, or remove what was begun"
        )


def _forecast(config: CollectConfig, shard: "_Shard | None", shards: _Shards, infos: list[dict[str, Any]]) -> list[str]:
    """What is about to be collected, judged by the first shard that is left; `infos` are the fields of each store.
    Raises `MechintError` if the disk is too small for it."""
    lines = [f"texts: {shards.source.said}"]
    if shard is None:
        return lines
    n_texts, exact = shards.about()
    # shards become a .pt one at a time, in float32
    dtype = "float32" if config.output.suffix == ".pt" else config.dtype
    rate: dict[str, Any] = {
        "rows_per_text": shard.block.n_rows / shard.record["n_texts"],
        "widths": [info["d_in"] for info in infos],
        "itemsize": DTYPES[dtype].itemsize,
    }
    lines += [
        forecast(n_texts, exact=exact, output=config.output, **rate),
        *shard_note(min(n_texts, config.texts_per_shard), **rate),
    ]
    read = plural(shard.record["n_texts"], "text")
    first = read if n_texts <= shard.record["n_texts"] else f"the first {read}"
    return [*lines, *treatment(shard.record["texts"], infos[0], first)]


def _write_shards(
    model: LanguageModel,
    shards_to_make: Iterable[_Shard],
    shards: _Shards,
    targets: list[_Target],
    ranks: Ranks,
    progress: bool,
) -> tuple[int, float]:
    """Make this process's missing shards. Returns the tokens that went through the model, and the seconds it took.

    Reading and tokenising, the model, and checking, hashing and writing each have threads of their own.
    """
    from tqdm import tqdm

    n_tokens, started = 0, time.perf_counter()
    bar = tqdm(
        total=shards.n_texts,
        initial=shards.n_texts - shards.n_texts_left,
        unit="text",
        desc="collecting",
        disable=not progress or ranks.rank > 0,
        mininterval=0.5 if sys.stderr.isatty() else 10,  # a log file needs no line every half second
    )

    def on_batch(shard: _Shard, tokens_before: int, contexts: int, tokens: int) -> None:
        """Texts count as done in proportion to the shard's tokens: one may be in several contexts."""
        nonlocal n_tokens
        n_texts, done = shard.record["n_texts"], n_tokens - tokens_before
        n_tokens += tokens
        bar.set_postfix_str(f"{n_tokens / (time.perf_counter() - started):,.0f} tokens/s", refresh=False)
        bar.update(n_texts * (done + tokens) // shard.block.n_tokens - n_texts * done // shard.block.n_tokens)

    limit = _shards_behind(model.device)
    with (
        bar,
        contextlib.closing(ahead(shards_to_make)) as ready,
        Behind(limit, threads=max(limit, min(len(targets), 4))) as writing,
    ):
        for shard in ready:
            missing = [target for target in targets if shard.number not in target.finished]
            if not missing:  # behind a gap in a stream, which is read in order
                bar.update(shard.record["n_texts"])
                continue
            count = functools.partial(on_batch, shard, n_tokens)
            rows = run_block(model, [target.hook for target in missing], shard.block, on_batch=count)
            if not shard.block.n_tokens:
                bar.update(shard.record["n_texts"])
            writing.submit([functools.partial(_write_shard, shard, rows, target) for target in missing])
            del rows  # its memory is free as soon as it is written
    return n_tokens, time.perf_counter() - started


def _shards_behind(device: str) -> int:
    """How many shards may be on their way to the disk while the next is computed. A GPU outruns one thread that hashes
    and writes."""
    return min(4, max(1, (os.cpu_count() or 1) // 2)) if device.startswith("cuda") else 1


def context_size(config: CollectConfig, model: LanguageModel) -> int:
    """Most tokens that the model reads at once here, BOS included."""
    return min(config.context_size or model.n_ctx, model.n_ctx)


def lay_out(
    config: CollectConfig, model: LanguageModel, read: TextsRead, *, first_id: int
) -> tuple[list[Context], dict[str, int]]:
    """The contexts of a shard's texts, of which the first has the number `first_id`; and the counts of the texts, with
    `n_contexts` and the `n_split` texts that did not fit one."""
    contexts = contexts_of(
        read.token_lists,
        range(first_id, first_id + len(read.token_lists)),
        context_size=context_size(config, model),
        bos=model.bos_token_id if config.prepend_bos else None,
        every_window=config.bos_every_window,
        pack=config.pack,
        keep_bos=config.keep_bos,
        separator=model.bos_token_id if config.pack else None,
    )
    room = context_size(config, model) - (config.prepend_bos or config.pack)
    n_split = sum(len(tokens) > room for tokens in read.token_lists)
    return contexts, {**read.counts, "n_contexts": len(contexts), "n_split": n_split}


def _finish(config: CollectConfig, target: _Target, model: LanguageModel, settled: dict[str, Any]) -> None:
    records = list(store_write.finished_shards(target.folder).values())
    info = store_write.store_info(settled, records, position_0_kept=config.keep_bos or not config.prepend_bos)
    if not info["n_rows"]:
        raise MechintError(
            f"{config.dataset} gave no token at all: its texts are too short; use --keep-bos or other texts"
        )
    if target.output.suffix == ".pt":
        assemble_pt(target.output, _sidecar(config, model, info), info)
    else:
        store_write.close_store(target.folder, info)


def _sidecar(config: CollectConfig, model: LanguageModel, info: dict[str, Any]) -> dict[str, Any]:
    """The original's sidecar: its five keys, and its config with the values that were really used."""
    original = SAETrainConfig(
        activation_dim=info["d_in"],
        activations_path=str(config.output),
        model_name=config.model,
        model_source=info["model_source"],
        hook_name=info["hook_name"],
        dataset_name=config.dataset,
        dataset_split=config.split,
        num_texts=info["n_texts"],
        max_chars=config.max_chars,
        seed=config.seed,
        device=model.device,
    ).to_dict()
    return {
        "activation_dim": info["d_in"],
        "activation_path": str(config.output),
        "config": {name: original[name] for name in _ORIGINAL_KEYS} | {"layer": info["layer"]},
        "git_commit": info["git_commit"],
        "num_vectors": info["n_rows"],
    }


def collect_command(config: CollectConfig) -> str:
    """The command line that collects this."""
    words = launcher("scripts/collect_activations.py").split()
    default = CollectConfig().to_dict()
    for name, value in config.to_dict().items():
        flag = name.replace("_", "-")
        if value == default[name] and name not in ("model", "hook", "dataset", "output"):
            continue
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(words)


def summary(done: Collected) -> str:
    """What the command prints for a person."""
    info = done.info
    texts = plural(info["n_texts"], "text")
    lines = [
        f"{texts}, {plural(each['n_rows'], 'vector')} of width {each['d_in']} at {hook}"
        for hook, (_, _, each) in done.stores.items()
    ]
    lines += treatment(info.get("texts", {}), info, texts)
    if done.already:
        lines.append("already collected; nothing was done")
    elif done.n_tokens:
        lines.append(f"{done.n_tokens:,} tokens in {done.seconds:.1f} s: {done.n_tokens / done.seconds:,.0f} tokens/s")
    if info["n_texts"] < info["settings"]["num_texts"]:
        lines.append(f"the source ended after {info['n_texts']:,} of {info['settings']['num_texts']:,} texts")
    for hook, (_, _, each) in done.stores.items():
        of_hook = f"{hook}: " if len(done.stores) > 1 else ""
        lines.append(of_hook + report_norms(each["norms"], each["n_rows"]))
    return "\n".join(lines)
