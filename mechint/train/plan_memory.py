"""Where the memory of a training goes, before it starts: its own code runs in miniature, and its tensors are counted.

Nearly all memory of a training lies in arrays of [batch, d_sae], [batch, d_in] and [d_in, d_sae]. Divide batch, d_in
and d_sae by s, and each of them takes s^2 times less, so s^2 times the peak of the small training is the peak of the
large one, whatever the architecture or the kernel does with them. The miniature takes some hundredths of a second.
"""

import dataclasses
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mechint.config import SAETrainConfig
from mechint.eval.reconstruction import MAX_BLOCK_ELEMENTS
from mechint.eval.sums import ReconstructionSums
from mechint.kernels import StepSettings, make_kernel
from mechint.sae import SAE, Objective, build_sae
from mechint.sae.base import find_architecture
from mechint.train.training import SAMPLE_ROWS, initialise, make_optimizer

# Elements of [batch, d_sae] in the miniature: small enough to be quick, large enough for s^2 to hold within 3 %.
MINIATURE_ELEMENTS = 2**15
FLOAT = 4
# Of dead latents, for what reviving them takes (--expected-dead of `mechint plan`).
EXPECTED_DEAD = 0.02
# Pages that the libraries touch once they are used (thread stacks, packed operands, compiled primitives), measured.
RUNTIME = 60 * 2**20
# What the C library's heap holds back of the arrays that come and go in a step, measured.
HEAP_SHARE = 1.1
# What torch's allocator cannot use of what it holds on a GPU (rounding, fragmentation), and cuBLAS's workspace.
CUDA_SHARE, CUDA_WORKSPACE = 1.05, 32 * 2**20


@dataclass(frozen=True)
class Part:
    """One line of where the memory goes."""

    name: str
    n_bytes: int
    note: str = ""


@dataclass(frozen=True)
class Phase:
    """What is in memory at the fullest moment of a part of the training."""

    name: str
    parts: tuple[Part, ...]

    @property
    def n_bytes(self) -> int:
        return sum(part.n_bytes for part in self.parts)


@dataclass(frozen=True)
class Memory:
    """The prediction for one device: its phases, the fullest of which decides."""

    device: str
    phases: tuple[Phase, ...]
    mapped: int = 0  # bytes of files that are read through the page cache, which gives them back when memory is short

    @property
    def fullest(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.n_bytes)

    @property
    def peak(self) -> int:
        return self.fullest.n_bytes


def predict_memory(
    config: SAETrainConfig,
    n_rows: int,
    *,
    library: int,
    mapped: int = 0,
    column_bytes: int = 0,
    kernel: str | None = None,
    expected_dead: float = EXPECTED_DEAD,
) -> list[Memory]:
    """Peak memory of `train(config)` on `n_rows` vectors: of the device and, where that is not the CPU, of the RAM.

    `library` is what the process takes before it trains, `mapped` the bytes of the activations' files, `column_bytes`
    those of their tokens, texts and positions.

    Raises:
        MechintError: an architecture's own settings do not go together.
    """
    device = str(config.device or "cpu").split(":")[0]
    n_train = n_rows - int(n_rows * config.val_fraction)
    mini = measure_miniature(config, n_rows, kernel=kernel or kernel_name(config), expected_dead=expected_dead)
    rows = Part("row numbers", column_bytes + 8 * n_rows, "which rows are trained on, and the texts they are from")
    sorting = Part("sorting texts", 40 * n_rows if column_bytes else 8 * n_rows, "to hold out whole texts")
    batch = config.batch_size * config.activation_dim * FLOAT
    weights = Part("weights", mini.weights, weights_note(config))
    optimizer = Part("Adam", 2 * mini.weights, "two moments of each weight")
    gradients = Part("gradients", mini.weights)
    step = Part(f"step buffers ({mini.kernel})", mini.step, arrays_note(mini.step, config))
    at_start = Part("sample of the rows", mini.start, "decides where training starts")
    block = evaluation_block(config, n_rows)
    what = f"{block:,} vectors and their {config.num_features:,} activations"
    at_end = Part("evaluation block", mini.evaluation, what)
    copies = Part("weights to save", mini.saved, "copies while files are written")
    base = Part("library", library + RUNTIME, "Python, torch and mechint")
    batches = Part("batch", 2 * batch, "vectors of this step, and the next")
    phases = (
        Phase("before", (base, rows, sorting)),
        Phase("start", (base, rows, weights, at_start)),
        Phase("steps", (base, rows, weights, optimizer, gradients, batches, step)),
        Phase("end", (base, rows, weights, optimizer, gradients, copies, at_end)),
    )
    if device == "cpu":
        return [Memory("cpu", phases, mapped)]
    sample = min(SAMPLE_ROWS, n_train) * config.activation_dim * FLOAT
    on_host = (
        Phase("before", (base, rows, sorting)),
        Phase("start", (base, rows, Part("sample of the rows", 3 * sample, at_start.note), weights)),
        Phase("steps", (base, rows, batches)),
        Phase("end", (base, rows, Part("weights to save", 3 * mini.weights, copies.note), batches)),
    )
    return [
        Memory(device, tuple(_on_gpu(phase, rows, sorting, base) for phase in phases)),
        Memory("cpu", on_host, mapped),
    ]


def _on_gpu(phase: Phase, *on_host: Part) -> Phase:
    parts = tuple(part for part in phase.parts if part not in on_host)
    slack = int((CUDA_SHARE - 1) * sum(part.n_bytes for part in parts)) + CUDA_WORKSPACE
    return Phase(phase.name, (*parts, Part("allocator", slack, "rounding, and cuBLAS's workspace")))


def weights_note(config: SAETrainConfig) -> str:
    """How the weights' size comes about."""
    return f"2 x {config.activation_dim:,} x {config.num_features:,} x 4 bytes"


def arrays_note(n_bytes: int, config: SAETrainConfig) -> str:
    """How many arrays of the activations' size that is."""
    return f"{n_bytes / (config.batch_size * config.num_features * FLOAT):.1f} x batch x d_sae x 4 bytes"


# --- the miniature ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Miniature:
    """Bytes at full size."""

    weights: int
    start: int  # above the weights, while the start is decided
    step: int  # above weights, moments, gradients and the batch, during a step
    saved: int  # copies of the weights that are made for the files
    evaluation: int  # above those, for one block of held-out vectors
    kernel: str


def kernel_name(config: SAETrainConfig) -> str:
    """The kernel that this training would get, found by asking for one for a small SAE."""
    device = str(config.device or "cpu")
    options = scaled_options(config, config.activation_dim / 64)
    times = max(1, min(config.num_features // config.activation_dim, 8))
    with torch.random.fork_rng(devices=[]):
        sae = build_sae(config.architecture, 64, 64 * times, options=options).to(device)
    sae.unit_decoder = config.decoder == "unit"
    optimizer = make_optimizer(sae, dataclasses.replace(config, device=device))
    project, precision = config.project_gradient, config.precision
    return make_kernel(sae, optimizer, kernel=config.kernel, project_gradient=project, precision=precision).name


def measure_miniature(
    config: SAETrainConfig, n_rows: int, *, kernel: str = "dense", expected_dead: float = EXPECTED_DEAD
) -> Miniature:
    """The training of `config`, each dimension divided by the same number, under a count of its tensors.

    The sparse kernel keeps numpy's arrays in sizes of its own: it says itself what its step takes.
    """
    on_cpu = str(config.device or "cpu") == "cpu"
    skips = kernel == "sparse"
    shrink = math.sqrt(config.batch_size * config.num_features / MINIATURE_ELEMENTS)
    d_in = min(config.activation_dim, max(4, round(config.activation_dim / max(shrink, 1.0))))
    shrink = config.activation_dim / d_in
    d_sae = max(1, round(config.num_features / shrink))
    # where d_in cannot shrink as far as the rows should, they are also made fewer
    fewer = max(1.0, config.batch_size / shrink * d_sae / MINIATURE_ELEMENTS / 4)
    small = dataclasses.replace(
        config,
        activation_dim=d_in,
        d_sae=d_sae,
        expansion=None,
        batch_size=_divided(config.batch_size, shrink * fewer),
        init_l0=None,  # works in blocks of a fixed number of latents, which do not shrink: `density_bytes`
        device="cpu",
    )
    options = scaled_options(config, shrink)
    block = evaluation_block(config, n_rows)
    n_sample = min(SAMPLE_ROWS, n_rows - int(n_rows * config.val_fraction))
    grow = shrink**2
    with torch.device("meta"):
        shape = (config.architecture, config.activation_dim, config.num_features)
        whole = build_sae(*shape, options=config.architecture_options)
    result: dict[str, Any] = {"weights": FLOAT * whole.num_params}

    def run() -> None:
        with torch.random.fork_rng(devices=[]), CountTensors(casts=on_cpu) as count:
            torch.manual_seed(0)
            sae = build_sae(config.architecture, d_in, small.num_features, options=options)
            sae.unit_decoder = config.decoder == "unit"
            optimizer = make_optimizer(sae, small)
            weights = sum(p.untyped_storage().nbytes() for p in sae.parameters())
            sample = torch.randn(_divided(n_sample, shrink * fewer), d_in)
            count.restart()
            initialise(sae, small, sample)
            result["start"] = int((count.peak - weights) * grow * fewer) + density_bytes(config, n_sample)
            del sample
            how = make_kernel(
                sae, optimizer, kernel="dense" if skips else kernel, project_gradient=config.project_gradient
            )
            objective = miniature_objective(config, sae, expected_dead, shrink)
            x = torch.randn(small.batch_size, d_in)
            how.step(x, StepSettings(1e-4, config.max_grad_norm, objective))
            fixed = 4 * weights + x.nbytes
            count.restart()
            how.step(x, StepSettings(1e-4, config.max_grad_norm, objective))
            result["step"] = int((count.peak - fixed) * grow * fewer)
            fixed = count.now()
            count.restart()
            saved = sae.saved_form(2.0)
            tensors = saved.tensors()
            result["saved"] = int((count.peak - fixed + weights) * grow)  # and the bytes that safetensors makes of them
            del tensors
            fixed = count.now()
            sums = ReconstructionSums(d_in, small.num_features)
            x = torch.randn(_divided(block, shrink * fewer), d_in)
            count.restart()
            with torch.inference_mode():
                sums.add(x, *saved.run(x))
            result["evaluation"] = int((count.peak - fixed) * grow * fewer)

    _on_one_thread(run)
    if on_cpu:
        result["step"] = int(result["step"] * HEAP_SHARE)
    if skips:
        from mechint.kernels.cpu import step_bytes

        result["step"] = step_bytes(whole, config.batch_size, result["step"]) + _revival(config, expected_dead)
    return Miniature(**result, kernel=kernel)


def _revival(config: SAETrainConfig, expected_dead: float) -> int:
    """AuxK's arrays of [batch, dead latents]."""
    if config.revive != "auxk" or config.steps * config.batch_size < config.dead_after_vectors:
        return 0
    return int(6 * config.batch_size * expected_dead * config.num_features * FLOAT)


def evaluation_block(config: SAETrainConfig, n_rows: int) -> int:
    """Held-out vectors that are evaluated at once."""
    at_once = min(config.eval_batch_size, max(1, MAX_BLOCK_ELEMENTS // config.num_features))
    return min(at_once, int(n_rows * config.val_fraction))


def _divided(number: int, by: float) -> int:
    return max(1, math.ceil(number / by))


def density_bytes(config: SAETrainConfig, n_sample: int) -> int:
    """What --init-l0 takes: pre-activations of the sample for 1,024 latents at once, and their largest."""
    if config.init_l0 is None:
        return 0
    return int(n_sample * min(1024, config.num_features) * FLOAT * (2 + 3 * config.init_l0 / config.num_features))


def scaled_options(config: SAETrainConfig, shrink: float) -> dict[str, Any]:
    """The architecture's settings, numbers of latents made smaller with the dictionary."""
    cls, options = find_architecture(config.architecture), config.architecture_options
    for name in cls.latent_counts:
        value = options.get(name, cls.options[name])
        if isinstance(value, tuple):
            options[name] = tuple(sorted({max(1, round(width / shrink)) for width in value}))
        elif value is not None:
            options[name] = float(max(1, round(float(value) / shrink)))
    return options


def miniature_objective(config: SAETrainConfig, sae: SAE, expected_dead: float, shrink: float) -> Objective:
    """What a step minimises while `expected_dead` of the latents are being revived, where the config revives any."""
    seen_enough = config.steps * config.batch_size >= config.dead_after_vectors
    dead = torch.arange(sae.d_sae) < expected_dead * sae.d_sae
    revives = config.revive == "auxk" and seen_enough
    wants_dead = revives or sae.wants_dead
    k_aux = config.k_aux or max(1, config.activation_dim // 2)
    return Objective(
        sparsity=1.0,
        dead=dead if wants_dead else None,
        k_aux=max(1, round(k_aux / shrink)),
        aux_coefficient=config.aux_coefficient if revives else 0.0,
    )


# Operations that on a CPU first cast all of an argument to the result's kind of numbers.
_CASTING = {getattr(torch.ops.aten, name) for name in ("sum", "mean", "mul", "add", "sub", "div")}


class CountTensors(TorchDispatchMode):
    """Counts the bytes of all tensors made under it that are still alive, after each operation of torch.

    `casts`: also those of the copies that a CPU makes where kinds of numbers are mixed.
    """

    def __init__(self, *, casts: bool = True) -> None:
        super().__init__()
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak, self.casts = 0, casts

    def now(self) -> int:
        self._live = {key: value for key, value in self._live.items() if not value[0].expired()}
        return sum(n_bytes for _, n_bytes in self._live.values())

    def restart(self) -> None:
        """The peak from here on."""
        self.peak = self.now()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        inside = 0
        if self.casts and func.overloadpacket in _CASTING and isinstance(made, Tensor):
            other = [a for a in args if isinstance(a, Tensor) and a.ndim and a.dtype != made.dtype]
            inside = sum(a.numel() for a in other) * made.element_size()
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                reference = StorageWeakRef(storage)
                self._live[reference.cdata] = (reference, storage.nbytes())
        self.peak = max(self.peak, self.now() + inside)
        return made


def _on_one_thread(run: Callable[[], None]) -> None:
    """Small matrices are not worth waking threads for; the setting is the thread's own, so it gets one."""
    failed: list[BaseException] = []

    def work() -> None:
        try:
            torch.set_num_threads(1)
            run()
        except BaseException as error:
            failed.append(error)

    before = torch.get_num_threads()
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    torch.set_num_threads(before)
    if failed:
        raise failed[0]
