"""Optional services that rows of metrics.csv are also sent to. The file is always written; a service is never needed.

Nothing that a service does may cost a training: what fails at its start or later is one warning, and the training goes
on with metrics.csv alone.
"""

import atexit
import contextlib
import contextvars
import functools
import hashlib
import importlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, final, runtime_checkable

from mechint.config import SAETrainConfig
from mechint.errors import MechintError, one_line

PROJECT = "mechint"


@runtime_checkable
class Tracker(Protocol):
    """A place for rows."""

    def log(self, values: dict[str, Any], step: int) -> None: ...

    def close(self) -> None: ...


def open_tracker(config: SAETrainConfig, run_dir: Path) -> Tracker | None:
    """The service that `--track` names, opened for this run; None for none.

    A run that is resumed goes on under its name where the service can do that. Where they keep their files:
    tensorboard and wandb in the run directory, trackio in its own place (TRACKIO_DIR moves it).

    Raises:
        MechintError: its package is not installed.
    """
    if config.track == "none":
        return None
    try:
        package = importlib.import_module({"tensorboard": "torch.utils.tensorboard"}.get(config.track, config.track))
    except ImportError:
        raise MechintError(
            f"--track {config.track} needs a package that is not installed: pip install {config.track}; metrics.csv is"
            " written without it too"
        ) from None
    start = {"tensorboard": _TensorBoard, "wandb": _start_wandb, "trackio": _start_trackio}[config.track]
    guarded = _Guarded(config.track, functools.partial(start, package, config, run_dir))
    return guarded if guarded.works else None


@final
class _Guarded:
    """A tracker that warns once when it fails, and is not asked again."""

    def __init__(self, name: str, start: Callable[[], Tracker]):
        self.name, self.works = name, True
        self.tracker: Tracker | None = None
        with self._warning("did not start"):
            self.tracker = start()
        atexit.register(self.close)  # a run that is stopped or fails has rows on their way too

    def log(self, values: dict[str, Any], step: int) -> None:
        if self.works and self.tracker is not None:
            with self._warning("failed"):
                self.tracker.log(values, step)

    def close(self) -> None:
        atexit.unregister(self.close)
        tracker, self.tracker = self.tracker, None
        if self.works and tracker is not None:
            with self._warning("failed to close"):
                tracker.close()

    @contextlib.contextmanager
    def _warning(self, what: str) -> Iterator[None]:
        """Services print to stdout, which belongs to results: what they say goes to stderr."""
        try:
            with contextlib.redirect_stdout(sys.stderr):
                yield
        except Exception as error:  # a service may raise anything, and none of it may end a training
            self.works = False
            reason = one_line(f"{type(error).__name__}: {error}", 200)
            warnings.warn(f"{self.name} {what} ({reason}); the training goes on with metrics.csv alone", stacklevel=4)


@final
class _TensorBoard:
    """Event files in `run_dir/tensorboard`."""

    def __init__(self, package: Any, config: SAETrainConfig, run_dir: Path):
        self._open = functools.partial(package.SummaryWriter, log_dir=str(run_dir / "tensorboard"))
        self._writer: Any = None

    def log(self, values: dict[str, Any], step: int) -> None:
        if self._writer is None:
            # a resumed run writes rows again that lie behind its saved state: the older ones are hidden
            self._writer = self._open(purge_step=step)
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()  # rows are few, and a killed run should not lose any

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


@final
class _Service:
    """A run of wandb, or of trackio, which has the same interface."""

    def __init__(self, run: Any):
        self.run = run

    def log(self, values: dict[str, Any], step: int) -> None:
        self.run.log(values, step=step)

    def close(self) -> None:
        self.run.finish()


def _start_wandb(package: Any, config: SAETrainConfig, run_dir: Path) -> Tracker:
    """Files in `run_dir/wandb`. Without a login they stay there, for `wandb sync`. WANDB_PROJECT and WANDB_ENTITY, if
    they are set, say where the run belongs; the second is read by wandb itself."""
    # The same directory is the same run, also after --resume; several runs of one process are kept apart.
    name = hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:16]
    start = functools.partial(
        package.init,
        project=os.environ.get("WANDB_PROJECT") or PROJECT,
        name=run_dir.name,
        id=name,
        resume="allow",
        reinit="create_new",
        dir=str(run_dir),
        config=config.to_dict(),
    )
    try:
        return _Service(start())
    except package.errors.UsageError as error:  # not logged in, and nobody to ask
        warnings.warn(f"wandb: {one_line(error, 100)} Rows are kept for `wandb sync` in {run_dir}/wandb", stacklevel=4)
        return _Service(start(mode="offline"))


def _start_trackio(package: Any, config: SAETrainConfig, run_dir: Path) -> Tracker:
    """Trackio's local database; runs are told apart by name, so the folder around the run is part of it."""
    name = f"{run_dir.resolve().parent.name}-{run_dir.name}"
    values = {key: value for key, value in config.to_dict().items() if value is not None}
    # trackio ends the run before it when a new one starts; in a context of its own it does not know of that one
    start = functools.partial(package.init, PROJECT, name=name, resume="allow", config=values)
    return _Service(contextvars.Context().run(start))
