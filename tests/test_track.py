"""The services that rows can be sent to: each for real, without a network, and what becomes of a run when one fails.

A service whose package is missing is skipped; the failures are tested with stand-ins for a package, so always.
"""

import csv
import importlib
import importlib.util
import json
import sqlite3
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from mechint.config import SAETrainConfig
from mechint.errors import MechintError
from mechint.train import train
from mechint.train.track import open_tracker

STEPS = 6


def needs(package: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"{package} is not installed: pip install {package}")


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SAETrainConfig:
    """A training of six steps with a row for each; services keep their files below tmp_path and know no account."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DIR", "TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
        monkeypatch.delenv(name, raising=False)
    torch.save(torch.randn(64, 8, generator=torch.Generator().manual_seed(0)), tmp_path / "x.pt")
    return SAETrainConfig(
        activations_path="x.pt",
        activation_dim=8,
        expansion=2,
        epochs=STEPS,
        batch_size=16,
        warmup_steps=0,
        log_every=1,
        run_name="tracked",
        kernel="dense",
        device="cpu",
    )


def rows_of(layout: Any) -> list[dict[str, str]]:
    with open(layout.metrics, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@needs("tensorboard")
def test_tensorboard_events_hold_the_rows(config: SAETrainConfig):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    layout = train(config.with_overrides(track="tensorboard"), progress=False)
    events = EventAccumulator(str(layout.root / "tensorboard")).Reload()
    rows = rows_of(layout)
    for name in ("loss", "mse", "l0_count", "lr", "grad_norm", "vectors_per_second"):
        found = events.Scalars(name)
        assert [event.step for event in found] == list(range(STEPS))
        assert [event.value for event in found] == pytest.approx([float(row[name]) for row in rows], rel=1e-6)


@needs("tensorboard")
def test_tensorboard_shows_a_row_that_was_done_again_once(config: SAETrainConfig, tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for steps, value in ((range(5), 1.0), (range(3, 6), 2.0)):  # stopped after step 4, resumed from a state of step 3
        tracker = open_tracker(config.with_overrides(track="tensorboard"), tmp_path)
        assert tracker is not None
        for step in steps:
            tracker.log({"loss": value}, step)
        tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss")
    assert [(event.step, event.value) for event in events] == [(0, 1), (1, 1), (2, 1), (3, 2), (4, 2), (5, 2)]


@needs("trackio")
def test_trackio_database_holds_the_rows(config: SAETrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture):
    importlib.import_module("trackio").utils.TRACKIO_DIR = tmp_path / "trackio"
    layout = train(config.with_overrides(track="trackio"), progress=False)
    assert "Trackio" not in capsys.readouterr().out, "stdout is for results"
    rows = rows_of(layout)
    with sqlite3.connect(next((tmp_path / "trackio").glob("*.db"))) as database:
        found = database.execute("select step, metrics from metrics where run_name = 'runs-tracked' order by step")
        logged = {step: json.loads(values) for step, values in found}
    assert list(logged) == list(range(STEPS))
    for step, row in enumerate(rows):
        assert logged[step]["loss"] == pytest.approx(float(row["loss"]), rel=1e-6)


def wandb_records(data: bytes) -> list[bytes]:
    """The records of a .wandb file: LevelDB's log format (blocks of 32 KiB; a record is checksum, length, kind and
    bytes, kind 1 for a whole one and 2, 3, 4 for the parts of one that crosses blocks) after a header of 7 bytes."""
    records, place, whole = [], 7, b""
    while place + 7 <= len(data):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            records.append(whole)
            whole = b""
    return records


@pytest.mark.slow
@needs("wandb")
def test_wandb_keeps_rows_offline_without_a_login(config: SAETrainConfig, monkeypatch: pytest.MonkeyPatch):
    from wandb.proto.wandb_internal_pb2 import Record

    with open("/dev/null") as nobody, pytest.warns(UserWarning, match="Rows are kept for `wandb sync` in"):
        monkeypatch.setattr(sys, "stdin", nobody)
        layout = train(config.with_overrides(track="wandb"), progress=False)
    (file,) = (layout.root / "wandb").glob("offline-run-*/run-*.wandb")
    assert not Path("wandb").exists(), "nothing beside the run"
    losses = []
    for data in wandb_records(file.read_bytes()):
        items = Record.FromString(data).history.item
        losses += [float(i.value_json) for i in items if i.key == "loss" or list(i.nested_key) == ["loss"]]
    assert losses == pytest.approx([float(row["loss"]) for row in rows_of(layout)], rel=1e-6)


class StandIn(types.ModuleType):
    """A package with wandb's interface whose runs record what they get, and fail where they are told to."""

    def __init__(self, name: str, fail_at: str = "", *, at_step: int = 0):
        super().__init__(name)
        self.fail_at, self.at_step = fail_at, at_step
        self.logged: list[int] = []
        self.finished = 0
        self.asked: dict[str, Any] = {}
        self.errors = types.SimpleNamespace(UsageError=type("UsageError", (Exception,), {}))

    def init(self, *args: Any, **kwargs: Any) -> "StandIn":
        self.asked = kwargs
        if self.fail_at == "init":
            raise ConnectionError("no route\nto host")
        return self

    def log(self, values: dict[str, Any], step: int) -> None:
        if self.fail_at == "log" and step >= self.at_step:
            raise ConnectionError("connection reset")
        self.logged.append(step)

    def finish(self) -> None:
        self.finished += 1
        if self.fail_at == "finish":
            raise TimeoutError("still uploading")


@pytest.mark.parametrize(
    ("fail_at", "says", "logged"),
    [
        ("init", r"wandb did not start \(ConnectionError: no route to host\)", 0),
        ("log", r"wandb failed \(ConnectionError: connection reset\)", 2),
        ("finish", r"wandb failed to close \(TimeoutError: still uploading\)", STEPS),
    ],
)
def test_a_service_that_fails_costs_one_warning_and_no_training(
    config: SAETrainConfig, monkeypatch: pytest.MonkeyPatch, fail_at: str, says: str, logged: int
):
    package = StandIn("wandb", fail_at, at_step=2)
    monkeypatch.setitem(sys.modules, "wandb", package)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        layout = train(config.with_overrides(track="wandb"), progress=False)
    said = [str(warning.message) for warning in caught if "wandb" in str(warning.message)]
    assert len(said) == 1 and "goes on with metrics.csv" in said[0] and "\n" not in said[0]
    with pytest.warns(UserWarning, match=says):
        warnings.warn(said[0], stacklevel=1)
    assert package.logged == list(range(logged))
    assert len(rows_of(layout)) == STEPS and layout.manifest is not None and layout.manifest.is_file()


def test_ctrl_c_inside_a_service_is_not_swallowed(config: SAETrainConfig, monkeypatch: pytest.MonkeyPatch):
    package = StandIn("wandb")
    package.log = lambda *args, **kwargs: (_ for _ in ()).throw(KeyboardInterrupt)  # type: ignore[method-assign]
    monkeypatch.setitem(sys.modules, "wandb", package)
    with pytest.raises(KeyboardInterrupt):
        train(config.with_overrides(track="wandb"), progress=False)


def test_a_run_is_told_its_name_and_settings_and_ended_once(config: SAETrainConfig, monkeypatch: pytest.MonkeyPatch):
    package = StandIn("wandb")
    monkeypatch.setitem(sys.modules, "wandb", package)
    layout = train(config.with_overrides(track="wandb"), progress=False)
    assert package.asked["name"] == "tracked" and package.asked["dir"] == str(layout.root)
    assert package.asked["config"]["batch_size"] == 16
    first, package.asked = package.asked["id"], {}
    open_tracker(config.with_overrides(track="wandb"), layout.root)
    assert package.asked["id"] == first, "a resumed run is the same run"
    assert package.finished == 1 and package.logged == list(range(STEPS))


def test_a_missing_package_is_named_with_what_installs_it(config: SAETrainConfig, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(MechintError, match=r"pip install trackio; metrics.csv is written without it"):
        train(config.with_overrides(track="trackio"), progress=False)


def test_no_service_no_tracker(config: SAETrainConfig, tmp_path: Path):
    assert open_tracker(config, tmp_path) is None
