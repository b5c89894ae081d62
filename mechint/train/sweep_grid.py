"""From the values of a grid to its members: one training config each, all checked before the first one starts."""

import itertools
from dataclasses import dataclass, replace
from typing import Any

from mechint.config import SAETrainConfig, SweepConfig, preset_values
from mechint.config.sweep import AXES, flag_of
from mechint.config.train import ARCHITECTURE_OPTIONS
from mechint.data.store import Activations
from mechint.errors import MechintError
from mechint.kernels.choose import KERNELS
from mechint.sae.base import SAE, find_architecture
from mechint.train.resolve import check_architecture, resolve, split

# How the value of an axis stands in a member's name.
LABELS = {
    "architecture": "{}",
    "expansion": "{}x",
    "d_sae": "{}latents",
    "l1_lambda": "lam{:.8g}",
    "target_l0": "L0-{:.8g}",
    "k": "k{:.8g}",
    "learning_rate": "lr{:.8g}",
    "seed": "seed{}",
}
# The two ways to say the width.
WIDTHS = ("expansion", "d_sae")
# Where the activations, the split and so the held-out rows of two members are the same.
SPLIT_FIELDS = ("seed", "val_fraction", "split_by", "max_norm_multiple")


@dataclass(frozen=True)
class Plan:
    """One member: its name, where it stands on the axes that apply to it, and all settings of its training."""

    name: str
    values: dict[str, Any]
    config: SAETrainConfig


def plan_members(config: SweepConfig, base: SAETrainConfig, activations: Activations, folder: str) -> list[Plan]:
    """The members of a grid in its order, each once, ready to train into `folder`.

    Raises:
        MechintError: no axis is given, an axis applies to no architecture of the grid, or a member cannot be trained
            as asked (which one is said).
    """
    grid = config.grid
    if not grid:
        raise MechintError(
            "nothing varies: give values for --lam, --k, --architecture, --expansion, --d-sae, --lr or --seed"
        )
    _check_base(base)
    base = resolve(base, activations)
    architectures = grid.get("architecture", [base.architecture])
    classes = {name: _class(name, base) for name in architectures}
    for axis in grid:
        if not any(_applies(axis, cls) for cls in classes.values()):
            raise MechintError(
                f"{flag_of(axis)} applies to none of the architectures {', '.join(classes)}: leave it out"
            )
    for option, value in base.architecture_options.items():
        # a preset may say more than an architecture needs
        given = preset_values(base.preset, base.architecture).get(option) != value
        if given and not any(option in cls.options for cls in classes.values()):
            raise MechintError(
                f"{option}={value!r} of the settings applies to none of {', '.join(classes)}: leave it out"
            )
    if base.steers_l0 and not any(cls.has_penalty for cls in classes.values()):
        raise MechintError(f"target_l0 of the settings applies to none of {', '.join(classes)}: leave it out")
    widths = _widths(grid, base.activation_dim)
    several = {axis for axis, values in grid.items() if len(values) > 1} | (set(WIDTHS) if len(widths) > 1 else set())
    plans: list[Plan] = []
    for name, cls in classes.items():
        settings = base.to_dict() | config.preset_for(name) | {"architecture": name}
        settings |= {option: None for option in ARCHITECTURE_OPTIONS if option not in cls.options}
        if base.steers_l0 and cls.has_penalty:
            settings["target_l0"] = base.target_l0
        settings["option"] = [word for word in base.option if word.split("=", 1)[0] in cls.options]
        axes = [
            [(axis, value) for value in values]
            for axis, values in grid.items()
            if axis not in ("architecture", *WIDTHS) and _applies(axis, cls)
        ]
        for combination in itertools.product(*([widths] if widths else []), *axes):
            chosen = {"architecture": name, **dict(combination)}
            label = _label(chosen, several, {plan.name for plan in plans})
            try:
                under = settings | dict.fromkeys(base.superseded(chosen, settings))
                member = SAETrainConfig.from_dict({**under, **chosen, "runs_root": folder, "run_name": label})
                member = member.with_latents(member.num_features).with_learning_rate()
                check_architecture(member)
            except MechintError as error:
                raise MechintError(f"member {label}: {error}") from None
            values = {axis: getattr(member, axis) for axis in AXES if _applies(axis, cls)}
            if values.get("k", 0) is None:
                values["k"] = cls.options["k"]
            plans.append(Plan(label, values, member))
    for plan in {split_key(plan.config): plan for plan in plans}.values():
        split(plan.config, activations)
    return plans


def _check_base(base: SAETrainConfig) -> None:
    if base.legacy_layout:
        raise MechintError("legacy_layout: members of a sweep are run directories; leave it out")
    if base.track not in ("none", "tensorboard"):
        raise MechintError(
            f"track {base.track!r} follows one run a process, a sweep has several: use --set track=tensorboard, or read"
            " metrics.csv of each member"
        )
    if base.kernel not in KERNELS:
        raise MechintError(f"unknown kernel {base.kernel!r}; valid: {', '.join(KERNELS)}")


def _class(name: str, base: SAETrainConfig) -> type[SAE]:
    replace(base, architecture=name)  # the config knows the names of files that are not imported yet
    return find_architecture(name)


def _widths(grid: dict[str, list[Any]], d_in: int) -> list[tuple[str, int]]:
    """The two axes of the width as one, each width once, as it was first given."""
    found: dict[int, tuple[str, int]] = {}
    for axis in WIDTHS:
        for value in grid.get(axis, []):
            found.setdefault(value * d_in if axis == "expansion" else value, (axis, value))
    return list(found.values())


def _applies(axis: str, cls: type[SAE]) -> bool:
    if axis == "k":
        return "k" in cls.options
    return cls.has_penalty if axis in ("l1_lambda", "target_l0") else True


def _label(values: dict[str, Any], several: set[str], taken: set[str]) -> str:
    """The architecture and every axis that has more than one value; a number if two members would be called alike."""
    named = [axis for axis in values if axis == "architecture" or axis in several]
    label = "-".join(LABELS[axis].format(values[axis]) for axis in named)
    return next(
        name for name in itertools.chain([label], (f"{label}-{n}" for n in itertools.count(1))) if name not in taken
    )


def split_key(config: SAETrainConfig) -> tuple[Any, ...]:
    """Equal for members that hold out the same rows."""
    return tuple(getattr(config, name) for name in SPLIT_FIELDS)


def batch_key(config: SAETrainConfig) -> tuple[Any, ...]:
    """Equal for members whose batches are the same."""
    return (*split_key(config), config.batch_size, config.batch_order, config.device)
