"""Optional services that rows of metrics.csv are also sent to. The file is always written; a service is never needed."""

import importlib
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from mechint.config import SAETrainConfig
from mechint.errors import MechintError


@runtime_checkable
class Tracker(Protocol):
    """A place for rows."""

    def log(self, values: dict[str, Any], step: int) -> None: ...

    def close(self) -> None: ...


def open_tracker(config: SAETrainConfig, run_dir: Path) -> Tracker | None:
    """The service that `--track` names, opened for this run; None for none.

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
    if config.track == "tensorboard":
        return _TensorBoard(package.SummaryWriter(log_dir=str(run_dir / "tensorboard")))
    # wandb's interface, which trackio has too; the project is named, the run carries its directory's name
    return _Wandb(package, package.init(project="mechint", name=run_dir.name, config=config.to_dict()))


class _TensorBoard:
    def __init__(self, writer: Any):
        self.writer = writer

    def log(self, values: dict[str, Any], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class _Wandb:
    def __init__(self, package: Any, run: Any):
        self.package, self.run = package, run

    def log(self, values: dict[str, Any], step: int) -> None:
        self.package.log(values, step=step)

    def close(self) -> None:
        self.package.finish()
