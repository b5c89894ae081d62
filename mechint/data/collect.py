"""Collect activations: texts in, a store (or one `.pt`) out, a shard at a time.

A shard holds a window of consecutive texts, so what is in it follows from its number alone: a killed collection goes on
with the shards that are missing, and several processes (`torchrun`) take every n-th. Either way the files are the same.
"""

import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mechint.config import CollectConfig, SAETrainConfig, layer_of_hook
from mechint.data import store_write
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
from mechint.data.windows import window_rows
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
    """What a collection left, and how fast this process was. `already`: it was there before, nothing was done."""

    path: Path
    metadata_path: Path
    info: dict[str, Any]
    n_tokens: int = 0
    seconds: float = 0.0
    rank: int = 0
    already: bool = False


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
    config: CollectConfig, *, progress: bool = True, on_note: Callable[[str], None] = lambda note: None
) -> Collected:
    """As `collect_activations`, with what the command reports. `on_note` is given, before the work begins, what is
    read, what will be left out of it, and how much the result will be."""
    with process_group() as ranks:
        advice = f"finished shards are kept; go on with: {collect_command(config)}"
        if ranks.watch is not None:
            ranks.watch.advice = advice
        try:
            settings = _settings(config, ranks)
            done = _already_collected(config, settings, ranks)
            if done is None:
                done = _collect(config, settings, ranks, progress, on_note)
            ranks.barrier()
        except RankLost as lost:
            raise RankLost(f"{lost}; {advice}") from lost
        return done


def _settings(config: CollectConfig, ranks: Ranks) -> dict[str, Any]:
    """The settings that decide the content of the result, in one spelling. Checks those that need nothing loaded."""
    layer = layer_of_hook(config.hook)
    if config.layer is not None and config.layer != layer:
        raise MechintError(
            f"--layer {config.layer} contradicts --hook {config.hook}"
            + (f", which is in layer {layer}" if layer is not None else ", which is in no layer")
            + ": give only --hook"
        )
    if not shards_folder(config.output).exists():
        check_output_path(shards_folder(config.output))
    settings = config.to_dict()
    for name in ("output", "layer", "preset", "checkpoint_every"):
        del settings[name]
    location = resolve_model(config.model)
    # a built-in name rather than where the package happens to be installed
    settings["model"] = config.model if config.model in BUILTIN_MODELS else location
    settings["texts_per_shard"] = config.texts_per_shard
    if config.dataset not in BUILTIN and not is_local(config.dataset):
        settings["world_size"] = ranks.world_size  # a data set on the Hub is dealt out to the processes
    return settings


def _already_collected(config: CollectConfig, settings: dict[str, Any], ranks: Ranks) -> Collected | None:
    """The finished result, if it is there and is what is asked for. Raises if it is something else."""
    output, metadata = config.output, sidecar_path(config.output)
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
    return Collected(output, metadata, info, rank=ranks.rank, already=True)


def _collect(
    config: CollectConfig,
    settings: dict[str, Any],
    ranks: Ranks,
    progress: bool,
    on_note: Callable[[str], None],
) -> Collected:
    folder = shards_folder(config.output)
    asked = _read_asked(folder)
    finished = store_write.finished_shards(folder) if asked else {}
    source = _open_source(config, asked, finished, ranks)
    try:
        shards = _Shards(config, source, finished, ranks)
        model = load_model(
            config.model,
            device=ranks.device(config.device),
            dtype=config.dtype,
            processing=config.processing,
            backend=config.backend,
            hook_name=config.hook,
            # the commit that it was begun with, if the newest one is another by now
            revision=asked["info"]["model_revision"] if asked else config.model_revision,
        )
        settled = _settled(config, settings, source, model)
        fixed = {"model_sha256": settled["model_sha256"], "texts": source.fingerprint()}
        if asked:
            _check_texts(config, asked["fixed"], fixed)
            store_write.check_same(asked["fixed"], fixed, str(folder))
            settled = asked["info"]
        if ranks.rank == 0:
            notes = _forecast(config, model, shards, settled)
            with store_write.only_writer(folder):
                for note in notes:
                    on_note(note)
                asked = {"settings": settings, "fixed": fixed, "info": settled, "command": collect_command(config)}
                store_write.begin_store(folder, asked)
                ranks.barrier()
                n_tokens, seconds = _write_shards(config, model, shards, folder, ranks, progress)
                ranks.barrier()
                info = _finish(config, model, settled, folder)
        else:
            ranks.barrier()
            n_tokens, seconds = _write_shards(config, model, shards, folder, ranks, progress)
            ranks.barrier()
            info = settled
        return Collected(config.output, sidecar_path(config.output), info, n_tokens, seconds, ranks.rank)
    finally:
        source.close()


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
    return open_texts(
        config.dataset,
        config.split,
        revision=revision,
        text_field=config.text_field,
        unit=config.unit,
        max_chars=config.max_chars,
        seed=config.seed,
        rank=ranks.rank,
        world_size=ranks.world_size,
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
        ended = [number for number, record in finished.items() if record["n_texts"] < self._length(number)]
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
        self.n_texts = sum(map(self._length, mine))
        self.n_texts_left = sum(map(self._length, self.numbers))
        self.finished = finished
        self.first = self._read(self.numbers[0]) if self.numbers else ([], None)
        if self.numbers and self.numbers[0] == 0 and not self.first[0]:
            raise no_texts(config.dataset)

    def _length(self, number: int) -> int:
        return min(self.size, self.num_texts - number * self.size)

    def about(self) -> tuple[int, bool]:
        """About how many texts all processes together still have to collect, and whether that is exact."""
        known = self.source.about()
        begun = 0 if not self.numbers else self.numbers[0] // self.step * self.size + len(self.first[0])
        ended = bool(self.numbers) and len(self.first[0]) < self._length(self.numbers[0])
        total = begun if ended else self.num_texts if known is None else min(max(known, begun), self.num_texts)
        done = sum(record["n_texts"] for record in self.finished.values())
        return max(total - done, 0), ended or known is not None and known >= self.num_texts

    def _read(self, number: int) -> tuple[list[Document], dict[str, Any] | None]:
        texts = self.source.read(number // self.step * self.size, self._length(number))
        return texts, self.source.state()

    def __iter__(self) -> Iterator[tuple[int, list[Document], dict[str, Any] | None]]:
        """(number of the shard, its texts, the source's state after them), until the source ends."""
        for number in self.numbers:
            texts, state = self.first if number == self.numbers[0] else self._read(number)
            if texts:
                yield number, texts, state
            if len(texts) < self._length(number):
                return


def _settled(
    config: CollectConfig, settings: dict[str, Any], source: TextSource, model: LanguageModel
) -> dict[str, Any]:
    """The fields of `store.json` that are known before the first shard."""
    return {
        **source.describe(),
        "settings": settings,
        "d_in": model.hook_width(config.hook),
        "dtype": config.dtype,
        "hook_name": config.hook,
        "layer": layer_of_hook(config.hook),
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


def _check_texts(config: CollectConfig, before: dict[str, Any], now: dict[str, Any]) -> None:
    if before["texts"] != now["texts"]:
        raise MechintError(
            f"the texts of {config.dataset} have changed since {config.output} was begun (names, sizes or times of"
            " files): bring them back to go on, or give another --output, or remove what was begun"
        )


def _forecast(config: CollectConfig, model: LanguageModel, shards: _Shards, settled: dict[str, Any]) -> list[str]:
    """What is about to be collected, judged by the first shard that is left. Raises `MechintError` if the disk is too
    small for it."""
    documents, _ = shards.first
    lines = [f"texts: {shards.source.said}"]
    if not documents:
        return lines
    read = read_texts(model, documents, max_chars=config.max_chars, prepend_bos=config.prepend_bos)
    contexts, counts = lay_out(config, model, read, first_id=0)
    n_texts, exact = shards.about()
    itemsize = 4 if config.output.suffix == ".pt" else DTYPES[config.dtype].itemsize
    rate: dict[str, Any] = {
        "rows_per_text": sum(sum(context.kept) for context in contexts) / len(documents),
        "bytes_per_row": settled["d_in"] * itemsize + 3 * 4,
    }
    size, problem = forecast(n_texts, exact=exact, output=config.output, **rate)
    if problem is not None:
        raise problem
    lines += [size, *shard_note(min(n_texts, config.texts_per_shard), **rate)]
    first = "" if n_texts <= len(documents) else "the first "
    return [*lines, *treatment(counts, settled, first + plural(len(documents), "text"))]


def _write_shards(
    config: CollectConfig, model: LanguageModel, shards: _Shards, folder: Path, ranks: Ranks, progress: bool
) -> tuple[int, float]:
    """Make this process's missing shards. Returns the tokens that went through the model, and the seconds it took."""
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

    def on_batch(contexts: int, tokens: int) -> None:
        nonlocal n_tokens
        n_tokens += tokens
        bar.set_postfix_str(f"{n_tokens / (time.perf_counter() - started):,.0f} tokens/s", refresh=False)
        bar.update(0)

    with bar:
        for number, documents, state in shards:
            read = read_texts(model, documents, max_chars=config.max_chars, prepend_bos=config.prepend_bos)
            contexts, counts = lay_out(config, model, read, first_id=number * config.texts_per_shard)
            rows = window_rows(model, config.hook, contexts, batch_size=config.batch_size, on_batch=on_batch)
            store_write.write_shard(
                folder,
                number,
                activations=rows.activations,
                tokens=rows.tokens,
                text_ids=rows.text_ids,
                positions=rows.positions,
                record={
                    "n_texts": len(documents),
                    "n_tokens": rows.n_tokens,
                    "texts_sha256": store_write.texts_sha256(read.texts),
                    "texts": counts,
                    "state": state,
                    "norms": rows.norms,
                },
            )
            bar.update(len(documents))
    return n_tokens, time.perf_counter() - started


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


def _finish(config: CollectConfig, model: LanguageModel, settled: dict[str, Any], folder: Path) -> dict[str, Any]:
    records = list(store_write.finished_shards(folder).values())
    info = store_write.store_info(settled, records, position_0_kept=config.keep_bos or not config.prepend_bos)
    if not info["n_rows"]:
        raise MechintError(
            f"{config.dataset} gave no token at all: its texts are too short; use --keep-bos or other texts"
        )
    if config.output.suffix == ".pt":
        assemble_pt(config.output, _sidecar(config, model, info), info)
    else:
        store_write.close_store(folder, info)
    return info


def _sidecar(config: CollectConfig, model: LanguageModel, info: dict[str, Any]) -> dict[str, Any]:
    """The original's sidecar: its five keys, and its config with the values that were really used."""
    original = SAETrainConfig(
        activation_dim=info["d_in"],
        activations_path=str(config.output),
        model_name=config.model,
        model_source=info["model_source"],
        hook_name=config.hook,
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
            words += [f"--{flag}", str(value)]
    return shlex.join(words)


def summary(done: Collected) -> str:
    """What the command prints for a person."""
    info = done.info
    texts = plural(info["n_texts"], "text")
    lines = [f"{texts}, {plural(info['n_rows'], 'vector')} of width {info['d_in']} at {info['hook_name']}"]
    lines += treatment(info.get("texts", {}), info, texts)
    if done.already:
        lines.append("already collected; nothing was done")
    elif done.n_tokens:
        lines.append(f"{done.n_tokens:,} tokens in {done.seconds:.1f} s: {done.n_tokens / done.seconds:,.0f} tokens/s")
    if info["n_texts"] < info["settings"]["num_texts"]:
        lines.append(f"the source ended after {info['n_texts']:,} of {info['settings']['num_texts']:,} texts")
    return "\n".join([*lines, report_norms(info["norms"], info["n_rows"])])
