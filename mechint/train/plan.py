"""What a training will take, before it starts: memory, disk and time; and the refusal of what cannot fit."""

import dataclasses
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mechint.config import SAETrainConfig
from mechint.data.store import Activations
from mechint.errors import MechintError
from mechint.sae import build_sae
from mechint.train.plan_available import available_memory, resident_memory
from mechint.train.plan_memory import EXPECTED_DEAD, FLOAT, Memory, kernel_name, predict_memory
from mechint.train.plan_time import Speed, fall_steps, measure_speed

# A training refuses to start only where this share of the predicted memory is not there: predictions lie within a
# factor of 1.25 of the measured peaks (docs/performance.md), and a wrong refusal would be worse than a late one.
CERTAIN = 0.8


@dataclass(frozen=True)
class Disk:
    """Bytes below the run directory."""

    checkpoint: int  # checkpoint.pt and sae/, each
    state: int  # one saved state
    peak: int
    at_end: int


@dataclass(frozen=True)
class Plan:
    """A prediction, and what there is."""

    config: SAETrainConfig
    n_rows: int
    kernel: str
    memory: tuple[Memory, ...]
    available: tuple[int | None, ...]  # beside each of `memory`, what this process holds already included
    disk: Disk
    disk_free: int
    speed: Speed | None
    startup: float  # seconds until the libraries are loaded
    expected_dead: float  # as far as the time goes

    @property
    def seconds(self) -> float | None:
        return None if self.speed is None else self.startup + self.speed.total(self.config)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values; bytes and seconds."""
        memory = {
            place.device: {
                "peak_bytes": place.peak,
                "available_bytes": available,
                "fullest": place.fullest.name,
                "mapped_bytes": place.mapped,
                "phases": {
                    phase.name: {part.name: part.n_bytes for part in phase.parts} | {"total": phase.n_bytes}
                    for phase in place.phases
                },
            }
            for place, available in zip(self.memory, self.available, strict=True)
        }
        speed = None
        if self.speed is not None:
            speed = {
                **dataclasses.asdict(self.speed),
                "startup": self.startup,
                "fall_steps": fall_steps(self.config),
                "steps_seconds": self.speed.steps(self.config),
                "steps_per_second": self.config.steps / self.speed.steps(self.config),
                "total_seconds": self.seconds,
            }
        return {
            "config": self.config.to_dict(),
            "n_rows": self.n_rows,
            "kernel": self.kernel,
            "memory": memory,
            "disk": {**dataclasses.asdict(self.disk), "free": self.disk_free},
            "time": speed,
            "expected_dead": self.expected_dead,
        }


def make_plan(
    config: SAETrainConfig,
    activations: Activations | None,
    n_rows: int,
    *,
    seconds: float = 10.0,
    expected_l0: float | None = None,
    expected_dead: float | None = None,
    startup: float = 0.0,
) -> Plan:
    """Predict, and if it fits and `seconds` is above 0, measure the time. `config.device` must be set.

    `expected_dead`, the share of latents that --revive auxk has to work on, is `EXPECTED_DEAD` for the memory and 0 for
    the time if not given: steps with some cost up to twice as much, and runs have none for most of their steps.

    Raises:
        MechintError: it does not fit; which setting to change to what is said.
    """
    assert config.device is not None
    kernel = kernel_name(config)
    library = resident_memory()
    predict = _predictor(
        activations, n_rows, library, kernel, EXPECTED_DEAD if expected_dead is None else expected_dead
    )
    memory = predict(config)
    available = tuple(_within_reach(place.device if place.device == "cpu" else config.device) for place in memory)
    refuse_memory(config, predict, available, certain=1.0)
    disk, free = predict_disk(config), shutil.disk_usage(_existing(Path(config.runs_root))).free
    refuse_disk(config, disk, free)
    speed = None
    if seconds > 0:
        speed = measure_speed(
            config, activations, n_rows, seconds=seconds, expected_l0=expected_l0, expected_dead=expected_dead or 0.0
        )
    return Plan(config, n_rows, kernel, memory, available, disk, free, speed, startup, expected_dead or 0.0)


def check_memory(config: SAETrainConfig, activations: Activations, *, held: int = 0) -> None:
    """Raise `MechintError` for a training that cannot fit into this machine; costs some hundredths of a second.

    `config.device` must be set. `held`: bytes of memory that something else will take beside the training.
    """
    assert config.device is not None
    predict = _predictor(activations, activations.n_rows, resident_memory() + held, kernel_name(config), EXPECTED_DEAD)
    available = tuple(
        _within_reach(place.device if place.device == "cpu" else config.device) for place in predict(config)
    )
    refuse_memory(config, predict, available, certain=CERTAIN)
    usage = shutil.disk_usage(_existing(Path(config.runs_root)))
    if usage.total:  # what is no disk (/proc) has no size; that nothing can be made there is said where it is tried
        refuse_disk(config, predict_disk(config), usage.free)


Predictor = Callable[[SAETrainConfig], tuple[Memory, ...]]


def _predictor(
    activations: Activations | None, n_rows: int, library: int, kernel: str, expected_dead: float
) -> Predictor:
    columns = 0
    if activations is not None and activations.info.get("shards") is not None:
        columns = 24 * n_rows  # tokens, texts and positions

    def predict(config: SAETrainConfig) -> tuple[Memory, ...]:
        mapped = n_rows * config.activation_dim * FLOAT if activations is None else activations.nbytes
        return tuple(
            predict_memory(
                config,
                n_rows,
                library=library,
                mapped=mapped,
                column_bytes=columns,
                kernel=kernel,
                expected_dead=expected_dead,
            )
        )

    return predict


def _within_reach(device: str) -> int | None:
    """What is free, and what this process holds of it already."""
    free = available_memory(device)
    return None if free is None else free + (resident_memory() if device == "cpu" else 0)


def _existing(folder: Path) -> Path:
    folder = folder.absolute()
    while not folder.is_dir():
        folder = folder.parent
    return folder


# --- refusals ---------------------------------------------------------------------------------------------------------


def refuse_memory(
    config: SAETrainConfig, predict: Predictor, available: tuple[int | None, ...], *, certain: float
) -> None:
    """Raise `MechintError` unless `certain` of the prediction is there on every device."""

    def misfit(config: SAETrainConfig) -> tuple[Memory, int] | None:
        for place, free in zip(predict(config), available, strict=True):
            if free is not None and place.peak * certain > free:
                return place, free
        return None

    width_name, width = config.width_setting

    def other(name: str, value: int) -> SAETrainConfig:
        if name == "batch_size":
            return dataclasses.replace(config, batch_size=value)
        return config.with_latents(value if name == "d_sae" else value * config.activation_dim)

    def largest(name: str, now: int) -> int | None:
        """The largest value of a setting, to 2 %, that fits."""
        low, high = 0, now
        while high - low > max(1, low // 50):
            middle = (low + high) // 2
            if misfit(other(name, middle)) is None:
                low = middle
            else:
                high = middle
        return low or None

    found = misfit(config)
    if found is None:
        return
    place, free = found
    flags = [
        (name, f"--{name.replace('_', '-')}", now)
        for name, now in (("batch_size", config.batch_size), (width_name, width))
    ]
    options = [
        f"{flag} to {value} (now {now})" for name, flag, now in flags if (value := largest(name, now)) is not None
    ]
    advice = (
        "lower " + " or ".join(options) if options else f"neither a smaller --batch-size nor {flags[1][1]} fits here"
    )
    where = "RAM" if place.device == "cpu" else f"{place.device} memory"
    raise MechintError(
        f"this training needs about {size(place.peak)} of {where} ({_largest_part(place)}), and {size(free)} are"
        f" there: {advice}"
    )


def _largest_part(place: Memory) -> str:
    part = max(place.fullest.parts, key=lambda part: part.n_bytes)
    return f"{size(part.n_bytes)} of it {part.name}"


def refuse_disk(config: SAETrainConfig, disk: Disk, free: int) -> None:
    """Raise `MechintError` if the run directory has no room."""
    if disk.peak <= free:
        return
    name, now = config.width_setting
    largest = max(1, int(now * free / disk.peak))
    raise MechintError(
        f"this training writes up to {size(disk.peak)} below {config.runs_root} (states of {size(disk.state)}, the SAE"
        f" twice), and {size(free)} are free: give another --runs-root, or lower --{name.replace('_', '-')} to"
        f" {largest} (now {now})"
    )


def predict_disk(config: SAETrainConfig) -> Disk:
    """Bytes of the run directory: the weights in two layouts, and the newest two states, a third while it is written.

    The state of step 0 has no moments of Adam yet.
    """
    with torch.device("meta"):
        sae = build_sae(
            config.architecture, config.activation_dim, config.num_features, options=config.architecture_options
        )
        weights = FLOAT * sae.saved_form().num_params
    state = 3 * weights + 8 * config.num_features
    small = 40_000 + 300 * (config.steps // config.log_every if config.log_every else 10)
    states = [weights, *[state] * ((config.steps - 1) // config.save_every)] if config.save_every else []
    states.append(state)
    peak = max(sum(states[-3:]), sum(states[-2:]) + 2 * weights) + small
    return Disk(weights, state, peak, 2 * weights + small)


def size(n_bytes: int) -> str:
    """Bytes for people."""
    return f"{n_bytes / 1e9:,.1f} GB" if n_bytes >= 9.95e8 else f"{max(1, round(n_bytes / 1e6)):,} MB"
