"""Settings of the steering commands: extract a direction, steer with it."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from mechint.config.base import DEFAULT_HOOK, ReadsSAE, require


@dataclass(frozen=True)
class ExtractConfig(ReadsSAE):
    """Extract a steering direction from two sets of prompts, or from a latent of an SAE.

    Without an SAE: by default raw activations of pythia-70m at blocks.3.hook_resid_post.
    """

    positive: Path | None = None
    """Prompts of the class that the direction points to, one a line; the file's name is the class's."""
    negative: Path | None = None
    """Prompts of the class that it points away from. With --latent both are optional and only score the latent."""
    latent: int | None = None
    """Take this latent's decoder row; needs --run-dir or --checkpoint."""
    method: Literal["mean-difference", "probe"] = "mean-difference"
    """Difference of the classes' means, or the weights of a logistic regression that tells them apart."""
    token: Literal["last", "mean"] = "last"
    """Activation of a prompt: at its last token, or the mean over its tokens without BOS."""
    name: str | None = None
    """Name of the direction; from the classes or the latent if not given."""
    output: Path | None = None
    """Folder for direction.safetensors and its sidecar; RUN_DIR/steering/NAME or steering/NAME if not given."""
    overwrite: bool = False
    """Replace the direction if it exists."""
    prepend_bos: bool | None = None
    """Put BOS before each prompt; true without a run."""
    description: str = ""
    """What the direction stands for, in a sentence; goes into the sidecar."""
    license: str = "research-only"
    """Licence noted in the sidecar."""
    source_paper: str | None = None
    """Paper or link that the prompts or the method are from, noted in the sidecar."""
    seed: int = 0
    """Seed of the folds that the held-out accuracy is measured over."""

    def __post_init__(self) -> None:
        given = (self.positive is None) + (self.negative is None)
        require(given != 1, "--positive and --negative belong together: give both files of prompts")
        require(
            given == 0 or self.latent is not None,
            "nothing to extract from: give --positive and --negative, or --run-dir and --latent",
        )
        require(
            self.latent is None or self.has_sae, f"--latent {self.latent} of which SAE? Give --run-dir or --checkpoint"
        )
        require(self.run_dir is None or self.checkpoint is None, "give --run-dir or --checkpoint, not both")

    @property
    def hook_default(self) -> str:
        return self.hook or DEFAULT_HOOK


@dataclass(frozen=True)
class SteerConfig(ReadsSAE):
    """Continue prompts with and without a steering edit, side by side."""

    prompts: Annotated[tuple[str, ...], arg(aliases=["--prompt"])] = ()
    """One or more prompts."""
    prompts_path: Path | None = None
    """In place of --prompts: a file of them, one a line."""
    direction: Path | None = None
    """A direction's folder or its .safetensors file; `mechint extract-steering` makes one."""
    latent: int | None = None
    """In place of --direction: a latent of the SAE in --run-dir or --checkpoint."""
    mode: Literal["add", "ablate", "clamp"] = "add"
    """add: coefficient times the direction. clamp: set the projection on it (or the latent) to the coefficient.
    ablate: project it out (or remove the latent)."""
    coefficients: Annotated[tuple[float, ...], arg(aliases=["--coefficient"])] = ()
    """One text each; for add -0.5 and 0.5 if not given."""
    unit: Literal["norm", "raw"] = "norm"
    """Of the coefficients. norm: times the mean norm of the hook's activations. raw: as it is, in activation units."""
    positions: Literal["all", "new"] = "all"
    """all: every position after BOS. new: the prompt's last position and what follows it."""
    max_new_tokens: int = 40
    """Most tokens to add."""
    temperature: float = 0.0
    """0 takes the likeliest token each time; otherwise tokens are drawn, with equal random numbers for every text."""
    top_k: int | None = None
    """Draw from the k likeliest tokens only."""
    seed: int = 0
    """Seed of the drawing."""
    layout: Literal["auto", "columns", "stacked"] = "auto"
    """How texts are shown; auto takes columns where the terminal is wide enough."""
    output: Path | None = None
    """Also write the texts and their numbers to this JSON file."""
    overwrite: bool = False
    """Replace --output if it exists."""

    def __post_init__(self) -> None:
        require(bool(self.prompts) != (self.prompts_path is not None), "give --prompts, or --prompts-path with a file")
        require(
            (self.direction is None) != (self.latent is None),
            "steer with what? Give --direction, or --run-dir and --latent (one of the two)",
        )
        require(
            self.latent is None or self.has_sae, f"--latent {self.latent} of which SAE? Give --run-dir or --checkpoint"
        )
        require(self.run_dir is None or self.checkpoint is None, "give --run-dir or --checkpoint, not both")
        for value in self.coefficients:
            require(math.isfinite(value), f"--coefficients should be numbers, found {value}")
        require(self.mode != "clamp" or bool(self.coefficients), "--mode clamp needs --coefficients: the values to set")
        require(
            self.mode != "ablate" or not self.coefficients,
            "--mode ablate has no coefficient: leave --coefficients out, or use --mode add or clamp",
        )
