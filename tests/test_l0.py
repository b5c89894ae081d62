"""--target-l0: the weight of the penalty is steered until the L0 that was asked for is there."""

import csv
import json
import math
from pathlib import Path

import pytest
import torch

from mechint.config import SAETrainConfig
from mechint.train import train
from mechint.train.l0 import AHEAD, TIME, Steering

D_IN = 24
PENALISED = ("gated", "jumprelu", "standard")


@pytest.fixture(scope="module")
def activations_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sparse combinations of 200 directions, about ten at a time, of very different strengths."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(200, D_IN, generator=generator), dim=1)
    strengths = torch.rand(8000, 200, generator=generator).pow(3) * (torch.rand(8000, 200, generator=generator) < 0.05)
    path = tmp_path_factory.mktemp("activations") / "acts.pt"
    torch.save(3 * strengths @ directions + 0.02 * torch.randn(8000, D_IN, generator=generator), path)
    return path


def settings(path: Path, root: Path, **changes: object) -> dict:
    values = dict(activations_path=str(path), activation_dim=D_IN, expansion=8, epochs=600, batch_size=512)
    values |= dict(preset="mechint", val_fraction=0.1, runs_root=str(root), run_name="run", device="cpu", save_every=0)
    return {**values, **changes}


@pytest.mark.parametrize("architecture", PENALISED)
@pytest.mark.parametrize("target", [8.0, 16.0])
def test_the_l0_asked_for_is_reached_from_any_weight(
    architecture: str, target: float, activations_path: Path, tmp_path: Path
):
    found = []
    for lam in (0.1, 2.0):
        asked = settings(activations_path, tmp_path, architecture=architecture, target_l0=target, l1_lambda=lam)
        layout = train(SAETrainConfig.from_dict(asked), progress=False)
        assert json.loads(layout.summary.read_text())["l0"] == pytest.approx(target, rel=0.15)
        with open(layout.metrics) as file:
            found.append(float(list(csv.DictReader(file))[-1]["lam"]))
    assert max(found) < 2 * min(found), f"weights that differed by 20 times end at {found}"


def test_what_the_steering_does_to_the_weight():
    config = SAETrainConfig(epochs=1000, target_l0=10.0, lambda_warmup_steps=50, learning_rate=2.0)
    steering = Steering()
    for step in range(50):  # while the weight warms up, it watches
        steering.look(config, 20.0, step=step, lr=2.0)
    assert steering.log_weight == 0.0 and steering.distance == pytest.approx(math.log(2))
    steering.look(config, 20.0, step=50, lr=2.0)
    assert steering.log_weight == pytest.approx(math.log(2) / (TIME * 1000))
    before = steering.log_weight
    steering.look(config, 20.0, step=51, lr=0.5)  # a quarter of the peak learning rate
    assert steering.log_weight - before == pytest.approx(math.log(2) / (TIME * 1000) / 4)
    far = Steering()
    for step in range(60, 70):  # a tenth of the latents of a wide SAE: no faster than from e times the target
        far.look(config, 4000.0, step=step, lr=2.0)
    assert far.log_weight == pytest.approx(10 / (TIME * 1000))
    falling, l0 = Steering(), 40.0
    for step in range(60, 160):  # halves every 35 steps: it will be there by itself
        falling.look(config, l0 := l0 * 0.98, step=step, lr=2.0)
    assert falling.slope == pytest.approx(math.log(0.98), rel=0.05) and AHEAD * 1000 * falling.slope < -1
    assert falling.log_weight < 0.3
    assert falling.distance is not None and falling.distance < 0
