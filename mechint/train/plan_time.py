"""How long a training takes here: some of its own steps, timed at its own sizes, and what follows from them.

The cost of a step of a ReLU or JumpReLU SAE depends on how many latents are active, and that falls during a training.
So steps are timed at three densities: as initialised, at `expected_l0`, and at their geometric mean. L0 is then taken
to fall evenly on a log scale from the first to the last over `FALL` times the warm-up of the sparsity weight, and to
stay there, which is how it goes in runs that are not started sparse (docs/log.md).
"""

import dataclasses
import functools
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from mechint.config import SAETrainConfig
from mechint.data.batches import BatchOrder, make_batches
from mechint.data.store import Activations
from mechint.eval.reconstruction import MAX_BLOCK_ELEMENTS
from mechint.eval.sums import ReconstructionSums
from mechint.kernels import Kernel, StepSettings, make_kernel
from mechint.sae import SAE, Objective, build_sae
from mechint.sae.base import find_architecture
from mechint.sae.init import set_density, tie_encoder
from mechint.train.plan_memory import FLOAT, miniature_objective
from mechint.train.training import SAMPLE_ROWS, initialise, make_optimizer

EXPECTED_L0 = 64.0
FALL = 1.5
FALL_LEAST = 100  # steps that it takes without a warm-up
# Weights that are timed at most; a wider dictionary is timed in part, its cost being proportional to its width.
MOST_WEIGHTS = 2**27
SMALLEST_BATCH = 256
WRITE_BYTES = 2**25


@dataclass(frozen=True)
class Speed:
    """Seconds of this training on this machine."""

    step_at_start: float
    step_midway: float
    step_at_end: float
    read: float  # of one batch
    save: float  # of one state
    evaluation: float
    preparation: float  # before the first step, without the imports
    l0_at_start: float
    l0_at_end: float
    kernel: str
    measured: str  # at which sizes

    def steps(self, config: SAETrainConfig) -> float:
        """Seconds of all steps."""
        return self.read * config.steps + step_seconds(
            config.steps, fall_steps(config), self.step_at_start, self.step_midway, self.step_at_end
        )

    def saves(self, config: SAETrainConfig) -> float:
        return self.save * (2 + (config.steps // config.save_every if config.save_every else -1))

    def total(self, config: SAETrainConfig) -> float:
        return self.preparation + self.steps(config) + self.saves(config) + self.evaluation


def fall_steps(config: SAETrainConfig) -> int:
    """Steps after which L0 is taken to be as expected; may be more than there are."""
    return max(FALL_LEAST, round(FALL * config.steps_of(config.lambda_warmup_steps)))


def step_seconds(steps: int, fall: int, at_start: float, midway: float, at_end: float) -> float:
    """Sum over the steps: linear between the three while L0 falls, then as at the end."""
    half = fall / 2
    first, second = min(steps, half), min(max(steps - half, 0.0), half)
    return (
        first * at_start
        + second * midway
        + ((midway - at_start) * first**2 + (at_end - midway) * second**2) / fall
        + max(steps - fall, 0) * at_end
    )


def measure_speed(
    config: SAETrainConfig,
    activations: Activations | None,
    n_rows: int,
    *,
    seconds: float,
    expected_l0: float | None = None,
    expected_dead: float,
) -> Speed:
    """Time steps of `config` for about `seconds`; needs no more memory than the training itself."""
    device, started = str(config.device or "cpu"), time.perf_counter()
    narrower = max(1, -(-config.activation_dim * config.num_features // MOST_WEIGHTS))
    small = config if narrower == 1 else config.with_latents(max(1, config.num_features // narrower))
    wider = config.num_features / small.num_features
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        sae = build_sae(
            small.architecture, small.activation_dim, small.num_features, options=_narrowed(small, config)
        ).to(device)
        sae.unit_decoder = config.decoder == "unit"
        optimizer = make_optimizer(sae, small)
        rows = _rows(config, activations, min(8192, max(n_rows, 2)))
    built = time.perf_counter()
    scale = initialise(sae, dataclasses.replace(small, init_l0=None), rows)
    share = (min(SAMPLE_ROWS, n_rows) / len(rows)) * (2 if config.init_l0 else 1)
    preparation = wider * (built - started) + share * (time.perf_counter() - built)
    rows = (rows * scale).to(device)
    if config.init_l0 is not None:
        set_density(sae, rows, min(config.init_l0 / wider, 0.9 * sae.d_sae))
    project, precision = config.project_gradient, config.precision
    kernel = make_kernel(sae, optimizer, kernel=config.kernel, project_gradient=project, precision=precision)
    objective = miniature_objective(config, sae, 0.0, 1.0)
    with_dead = miniature_objective(config, sae, expected_dead, 1.0)
    timer = _Timer(kernel, rows, config, device, seconds / 3)
    first = time.perf_counter()
    timer.step(objective, SMALLEST_BATCH)  # loads or compiles what there is to compile
    preparation += time.perf_counter() - first
    batch = timer.choose_batch(objective)
    at_start, l0_start = timer.measure(objective, batch)
    midway = at_end = at_start
    l0_end = l0_start
    if sae.has_penalty and (wanted := _wanted_l0(config, expected_l0)) < l0_start * wider:
        middle = (wanted * l0_start * wider) ** 0.5
        seen = []
        for l0 in (middle, wanted):
            l0 = min(max(l0 / wider, 1.0), 0.9 * sae.d_sae)
            timer.rows = planted_rows(sae, round(l0), len(rows))
            set_density(sae, timer.rows, l0)
            seen.append(timer.measure(with_dead, batch))
        (midway, _), (at_end, l0_end) = seen
    elif with_dead.dead is not None and with_dead.dead.any():
        at_start = midway = at_end = timer.measure(with_dead, batch)[0]
    del kernel, optimizer
    evaluation = _evaluation(sae, rows, config, int(n_rows * config.val_fraction)) * wider
    read, check = _reading(config, activations, n_rows)
    state_bytes = 3 * FLOAT * 2 * config.activation_dim * config.num_features
    return Speed(
        step_at_start=at_start * wider,
        step_midway=midway * wider,
        step_at_end=at_end * wider,
        read=read,
        save=_writing(Path(config.runs_root), state_bytes),
        evaluation=evaluation + _writing(Path(config.runs_root), state_bytes) * 2 / 3,
        preparation=preparation + check,
        l0_at_start=l0_start * wider,
        l0_at_end=l0_end * wider,
        kernel=timer.kernel.name,
        measured=f"{min(batch, config.batch_size):,} of {config.batch_size:,} vectors a step,"
        f" {small.num_features:,} of {config.num_features:,} latents",
    )


def _wanted_l0(config: SAETrainConfig, expected_l0: float | None) -> float:
    return expected_l0 or config.target_l0 or min(EXPECTED_L0, config.num_features / 8)


def _narrowed(small: SAETrainConfig, config: SAETrainConfig) -> dict[str, object]:
    options = small.architecture_options
    if small.num_features != config.num_features:
        for name in find_architecture(small.architecture).latent_counts:
            value = options.pop(name, None)
            if value is not None and not isinstance(value, tuple):
                options[name] = min(float(value), small.num_features)
    return options


def _rows(config: SAETrainConfig, activations: Activations | None, count: int) -> Tensor:
    """Evenly spaced rows of the activations, or numbers drawn in their place."""
    if activations is None:
        return torch.randn(count, config.activation_dim)
    return activations.rows(torch.linspace(0, activations.n_rows - 1, count).long())


@torch.no_grad()
def planted_rows(sae: SAE, l0: int, count: int) -> Float[Tensor, "count d_in"]:
    """Vectors made of `l0` decoder rows each, and the encoder tied to those rows, as training would end.

    With weights as drawn, pre-activations crowd around any threshold, and deciding which are above costs more than in a
    trained SAE, where the active ones stand apart.
    """
    tie_encoder(sae)
    device = sae.W_dec.device
    latents = torch.randint(sae.d_sae, (count, l0), generator=torch.Generator().manual_seed(0)).to(device)
    strengths = 1 + torch.rand(count, l0, generator=torch.Generator().manual_seed(1)).to(device)
    bag = torch.nn.functional.embedding_bag(latents, sae.W_dec, per_sample_weights=strengths, mode="sum")
    return bag + sae.b_dec


class _Timer:
    """Times steps of one kernel. The learning rate is next to nothing, so that the density stays what was set."""

    def __init__(self, kernel: Kernel, rows: Tensor, config: SAETrainConfig, device: str, seconds: float):
        self.kernel, self.rows, self.config, self.device, self.seconds = kernel, rows, config, device, seconds
        self.l0 = 0.0

    def batch(self, size: int) -> Tensor:
        return self.rows[torch.arange(size, device=self.rows.device) % len(self.rows)]

    def step(self, objective: Objective, size: int) -> float:
        """Seconds of one step on a batch of `size` vectors."""
        x = self.batch(min(size, self.config.batch_size))
        self._wait()
        start = time.perf_counter()
        result = self.kernel.step(x, StepSettings(1e-12, self.config.max_grad_norm, objective))
        self._wait()
        taken = time.perf_counter() - start
        self.l0 = result.n_active.item() / len(x)
        return taken

    def choose_batch(self, objective: Objective) -> int:
        """The largest batch, up to the training's own, of which a few steps fit into the time."""
        size = min(SMALLEST_BATCH, self.config.batch_size)
        taken = min(self.step(objective, size) for _ in range(2))
        while size < self.config.batch_size and 2 * taken * 4 < self.seconds:
            size = min(2 * size, self.config.batch_size)
            taken = self.step(objective, size)
        return size

    def measure(self, objective: Objective, size: int) -> tuple[float, float]:
        """`(seconds of a step of the training's own batch size, L0)`."""
        until = time.perf_counter() + self.seconds
        # a GPU's kernel is captured after some steps, and looks at the density every 64
        for _ in range(140 if self.device.startswith("cuda") else 1):
            self.step(objective, size)
            if time.perf_counter() > until - self.seconds / 2:
                break
        times = []
        while len(times) < 2 or (time.perf_counter() < until and len(times) < 25):
            times.append(self.step(objective, size))
        taken, l0 = statistics.median(times), self.l0
        if size == self.config.batch_size:
            return taken, l0
        # Adam's share does not grow with the batch
        self._wait()
        start = time.perf_counter()
        self.kernel.backward(self.batch(size), objective)
        self._wait()
        backward = min(time.perf_counter() - start, taken)
        return (taken - backward) + backward * self.config.batch_size / size, l0

    def _wait(self) -> None:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()


def _evaluation(sae: SAE, rows: Tensor, config: SAETrainConfig, n_val: int) -> float:
    """Seconds of the held-out rows, from one block of them."""
    size = min(config.eval_batch_size, max(1, MAX_BLOCK_ELEMENTS // config.num_features), max(n_val, 1), 1024)
    x = rows[torch.arange(size, device=rows.device) % len(rows)]
    sums = ReconstructionSums(sae.d_in, sae.d_sae)

    def block() -> None:
        with torch.inference_mode():
            sums.add(x, *sae.run(x))

    block()
    return _timed(block) / size * n_val


def _reading(config: SAETrainConfig, activations: Activations | None, n_rows: int) -> tuple[float, float]:
    """Seconds to read one batch, and to look through all rows once for what is not finite."""
    if activations is None:
        count = max(1, min(n_rows, 2**24 // config.activation_dim))
        pool = torch.zeros(count, config.activation_dim)
        picks = torch.randint(count, (config.batch_size,), generator=torch.Generator().manual_seed(0))
        taken = _timed(lambda: pool.index_select(0, picks))
        return taken, taken / config.batch_size * n_rows / 2
    batches = make_batches("shuffle", torch.arange(n_rows), config.batch_size, config.seed)
    taken = statistics.median(_timed(functools.partial(_read_batch, activations, batches, step)) for step in range(3))
    some = min(n_rows, 16384)
    return taken, _timed(lambda: next(activations.batches(some)).sum()) / some * n_rows


def _read_batch(activations: Activations, batches: BatchOrder, step: int) -> Tensor:
    return activations.rows(batches.indices(step))


def _writing(folder: Path, n_bytes: int) -> float:
    """Seconds to save that many bytes below `folder`, as states are saved; 0 where nothing can be written."""
    folder = folder.absolute()
    while not folder.is_dir():
        folder = folder.parent
    some = min(n_bytes, WRITE_BYTES)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:

            def write() -> None:
                torch.save(torch.zeros(some // FLOAT), file)
                file.flush()
                os.fsync(file.fileno())

            return _timed(write) * n_bytes / max(some, 1)
    except OSError:
        return 0.0


def _timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
