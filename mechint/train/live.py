"""Training straight from a model: what a run needs of it beside the loop, which asks for the next rows only."""

import contextlib
import math

from jaxtyping import Float
from torch import Tensor

from mechint.config import CollectConfig, SAETrainConfig
from mechint.data.collect import collect, open_source
from mechint.data.norms import outliers, row_norms
from mechint.data.ranks import n_processes
from mechint.data.source import Live
from mechint.data.store import Activations, open_activations
from mechint.errors import MechintError
from mechint.train.layout import Layout

# The folder of a run that holds the activations of the texts that are kept apart.
HELD_OUT = "heldout"
# Texts that are kept apart at most: enough for what is measured on them, whatever the length of the training.
MOST_HELD_OUT = 1000


def collect_settings(config: SAETrainConfig) -> CollectConfig:
    """Model, hook and texts of a live training."""
    assert config.live is not None
    settings = {name: value for name, value in config.live.items() if name != "n_held_out"}
    return CollectConfig.from_dict({**settings, "device": config.device})


def with_held_out(config: SAETrainConfig) -> SAETrainConfig:
    """The config with the number of texts that are kept apart: the first ones, a share of those that there are."""
    assert config.live is not None
    settings = collect_settings(config)
    if config.val_fraction == 0:
        raise MechintError("--val-fraction 0 leaves nothing to measure a training straight from a model on")
    enough = min(settings.num_texts, math.ceil(MOST_HELD_OUT / max(config.val_fraction, 1e-3)))
    found = 0
    with contextlib.closing(open_source(settings)) as source:
        while found < enough and (texts := source.read(found, min(settings.texts_per_shard, enough - found))):
            found += len(texts)
    n_held_out = max(1, int(found * config.val_fraction))
    return SAETrainConfig.from_dict({**config.to_dict(), "live": {**config.live, "n_held_out": n_held_out}})


def open_live(config: SAETrainConfig) -> Live:
    """The source of rows. Raises `MechintError` before anything runs, as `collect` does."""
    settings = collect_settings(config)
    assert config.live is not None
    if len(settings.hooks) > 1:
        raise MechintError(
            f"one SAE is trained on one hook, got {', '.join(settings.hooks)}: give one of them, or collect all with"
            " `mechint collect` and train on each"
        )
    if n_processes() > 1:
        raise MechintError(
            "a training straight from a model is one process: collect first (`mechint collect`, under torchrun too),"
            " then train on --activations-path"
        )
    if config.legacy_layout:
        raise MechintError("--legacy-layout trains on stored activations only: collect them first")
    return Live(
        settings,
        batch_size=config.batch_size,
        buffer_rows=config.buffer_rows,
        seed=config.seed,
        first_text=config.live["n_held_out"],
    )


def hold_out(live: Live, config: SAETrainConfig, layout: Layout, *, progress: bool) -> Activations:
    """Collect the texts that are kept apart into the run, with the model that is loaded."""
    assert config.live is not None
    asked = collect_settings(config).with_overrides(num_texts=config.live["n_held_out"], output=layout.root / HELD_OUT)
    collect(asked, progress=progress, model=live.model)
    return open_activations(layout.root / HELD_OUT)


def described(config: SAETrainConfig, live: Live) -> SAETrainConfig:
    """The config with what is known once the model is loaded: widths, and where the held-out rows will be."""
    (hook,) = live.hook_names
    settings = {**config.to_dict(), "activation_dim": live.d_in[hook], "hook_name": hook}
    if config.expansion is not None:
        settings["d_sae"] = None
    return SAETrainConfig.from_dict(settings)


def first_rows(live: Live, config: SAETrainConfig, n_rows: int) -> Float[Tensor, "n d_in"]:
    """Some of the first rows that training will see. From here on none is given whose norm is above
    `max_norm_multiple` times their median."""
    (hook,) = live.hook_names
    if config.max_norm_multiple:
        live.leave_out(outliers(row_norms(live.sample(hook, n_rows)), config.max_norm_multiple).limit)
    return live.sample(hook, n_rows)
