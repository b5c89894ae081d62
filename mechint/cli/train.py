"""`mechint train`, `scripts/train_sae.py`, `train.py`."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mechint.cli.flags import command, flag_given, is_first_process, parse, said_once, settings_file, split_flags
from mechint.config import CollectConfig, SAETrainConfig, preset_values
from mechint.errors import MechintError

# Flags of collect that say what a training straight from a model reads, beside those that train has itself.
OF_COLLECT = (
    *("split", "revision", "text_field", "unit", "context_size", "bos_every_window", "pack", "keep_bos"),
    *("dtype", "backend", "device_map", "model_revision", "checkpoint_every"),
)


@dataclass(frozen=True)
class TrainFlags(SAETrainConfig):
    """Train a sparse autoencoder. --preset mechint is the recipe we recommend, with --k 32 for topk and --target-l0 32
    for others; without a preset it is the canonical one: ReLU, L1, decoder rows renormalised after each step.

    On stored activations (--activations-path), or straight from a model: --model and --dataset, --hook or --layer, and
    any flag of `mechint collect` that says how texts are read. Numbers of steps may also be given as a share of all
    steps: 5% is the first twentieth.
    """

    resume: Path | None = None
    """Go on with a stopped run: its directory. Settings come from the run; another value for one is an error."""

    def check_width(self) -> None:
        """What is wrong is known once d_in is, which the activations may say: the config that is made then checks."""


def straight_from_a_model(argv: Sequence[str]) -> tuple[list[str], dict[str, Any] | None]:
    """The words for train, and the settings of collect if no store is named but a model and texts are.

    Raises:
        MechintError: flags that belong to only one of the two ways.
    """
    own, reading = split_flags(argv, OF_COLLECT)
    stored = flag_given(own, "--activations-path", "--resume") or "activations_path" in settings_file(own)
    model, texts = flag_given(own, "--model", "--model-name"), flag_given(own, "--dataset", "--dataset-name")
    if stored or not (model and texts):
        if reading:
            raise MechintError(
                f"{reading[0].split('=')[0]} says how texts are read, in a training straight from a model: give --model"
                " and --dataset" + (" and no --activations-path" if stored else "")
            )
        return own, None
    known = {*CollectConfig.field_names(), *CollectConfig.aliases(), "model_name", "hook_name", "dataset_name"}
    shared = split_flags(own, known - {"preset", "batch_size", "output"})[1]
    return own, parse(CollectConfig, [*shared, *reading], prog="train_sae.py").for_training()


@command
def main(argv: Sequence[str]) -> int:
    with said_once():
        argv, live = straight_from_a_model(argv)
        flags = parse(TrainFlags, argv, prog="train_sae.py", presets=preset_values, config_file=True)
        settings = {name: value for name, value in flags.to_dict().items() if name != "resume"}
        if flags.resume is not None:
            check_same_settings(flags.resume, argv)
        elif live is not None:
            settings |= {"live": live, "num_texts": live["num_texts"]}
        elif not flag_given(argv, "--activation-dim", "--d-in") and not {"activation_dim", "d_in"} & {
            *settings_file(argv)
        }:
            from mechint.data import open_activations

            settings["activation_dim"] = open_activations(flags.activations_path).d_in
    from mechint.eval import print_eval_summary
    from mechint.provenance import read_json
    from mechint.train import Stopped, resume, train

    try:
        layout = train(SAETrainConfig.from_dict(settings)) if flags.resume is None else resume(flags.resume)
    except Stopped as stopped:
        if is_first_process():
            print(f"stopped; the state is saved. To go on: {stopped.command}", file=sys.stderr)
        return 130
    if not is_first_process():
        return 0
    summary = read_json(layout.summary)
    config = read_json(layout.config)
    for note in [*(notes(config) if flags.resume is None else []), *doubts(SAETrainConfig.from_dict(config), summary)]:
        print(f"note: {note}", file=sys.stderr)
    if (left_out := summary.get("left_out")) and left_out["n_rows"]:
        print(f"note: {outliers_in_words(left_out)}", file=sys.stderr)
    if layout.manifest is not None:  # files hold paths relative to the run; a person wants them from here
        paths = {"run_dir": layout.root, "checkpoint_path": layout.checkpoint, "config_path": layout.config}
        summary |= {name: str(path) for name, path in paths.items()}
    print_eval_summary(summary)
    return 0


def notes(config: dict[str, Any]) -> list[str]:
    """In words, what is not known of the activations that a training was on, or was assumed of them."""
    from mechint.data import open_activations

    found = []
    if assumed := open_activations(config["activations_path"]).info.get("assumed"):
        found.append(f"{config['activations_path']}: {assumed}")
    flags = {
        "model_name": "--model",
        "hook_name": "--hook",
        "processing": "--processing",
        "prepend_bos": "--prepend-bos",
    }
    if unknown := {name: flag for name, flag in flags.items() if config[name] is None}:
        found.append(
            f"{config['activations_path']} does not say its {', '.join(unknown)}: not recorded;"
            f" {', '.join(unknown.values())} can say it here, or to the commands that read the SAE"
        )
    return found


# Times that each row may be seen before it is worth saying, and the share of latents that no sparse code has active.
MANY_PASSES, NOT_SPARSE = 20, 0.25


def doubts(config: SAETrainConfig, summary: dict[str, Any]) -> list[str]:
    """In words, why a finished training may not be what it seems: what it never reached, and what came out."""
    from mechint.sae import find_architecture

    found = []
    warmup, lam_warmup = (config.steps_of(value) for value in (config.warmup_steps, config.lambda_warmup_steps))
    if warmup >= config.steps:
        found.append(
            f"all {config.steps:,} steps lie within the warm-up of the learning rate ({warmup:,}), which ended at"
            f" {config.steps / warmup:.0%} of its peak: more --steps, or --warmup-steps 5%"
        )
    l0, n_latents = summary.get("l0"), summary["num_features"]
    has_penalty = find_architecture(config.architecture).has_penalty
    if has_penalty and lam_warmup > config.steps and config.target_l0 is None:
        found.append(
            f"the penalty rose over {lam_warmup:,} steps and ended at {config.steps / lam_warmup:.0%} of --lam"
            f" {config.l1_lambda:g}: more --steps, or --lambda-warmup-steps 10%"
        )
    if l0 is not None and l0 > NOT_SPARSE * n_latents and has_penalty:
        found.append(
            f"{l0:.0f} of {n_latents:,} latents are active on a vector, which is not sparse: --target-l0 32 steers the"
            " penalty there, --preset mechint is the recipe we recommend"
        )
    if l0 is not None and config.steers_l0 and abs(l0 / (config.target_l0 or l0) - 1) > 0.1:
        found.append(f"the L0 is {l0:.1f}, --target-l0 was {config.target_l0:g}: more --steps bring it nearer")
    passes = config.steps * config.batch_size / max(summary.get("n_train") or 1, 1)
    if passes > MANY_PASSES:
        found.append(
            f"each of the {summary['n_train']:,} training rows was seen {passes:.0f} times: collect more texts"
        )
    return found


def outliers_in_words(left_out: dict[str, Any]) -> str:
    """What was left out of training for its norm."""
    tokens = ", ".join(f"{token} ({count:,})" for token, count in left_out["tokens"].items())
    limit = f"{left_out['multiple']:g} times the median norm ({left_out['norm_limit']:.4g})"
    return (
        f"{left_out['n_rows']:,} rows above {limit} were left out of training"
        + (f"; their tokens, with how many rows each: {tokens}" if tokens else "")
        + "; --max-norm-multiple 0 keeps them"
    )


def check_same_settings(run_dir: Path, argv: Sequence[str]) -> None:
    """Raise `MechintError` if the command line gives a setting another value than the run has."""
    from mechint.runs import Run

    config = Run(run_dir).config
    asked = parse(
        TrainFlags, argv, prog="train_sae.py", presets=preset_values, config_file=True, defaults=config.to_dict()
    )
    SAETrainConfig.check_width(asked)
    config, asked = (one.with_latents(one.num_features) for one in (config, asked))
    for name in SAETrainConfig.field_names():
        was, now = getattr(config, name), getattr(asked, name)
        if was != now:
            raise MechintError(
                f"{run_dir} is being trained with {name} {was!r}, not {now!r}: --resume takes its settings from the"
                " run; leave the flag out, or start a new run"
            )
