"""Settings of the commands that load what was published: list-saes, list-steering, load-sae, apply-steering, pull."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from mechint.config.base import Config, require


@dataclass(frozen=True)
class ListConfig(Config):
    """List what registries name."""

    registry: Path | None = None
    """One more registry file, which counts most."""
    json: bool = False
    """Print JSON."""


@dataclass(frozen=True)
class LoadSaeConfig(Config):
    """Download an SAE, check its files against the hashes that were published with it, open it, and say what it is."""

    name: Positional[str]
    """A name of a registry (`mechint list-saes`), user/repo or user/repo/folder of the Hub, or a local folder."""
    revision: str | None = None
    """Branch, tag or commit of the repository; the newest if not given."""
    registry: Path | None = None
    """One more registry file, which counts most."""
    cache_dir: Path | None = None
    """In place of the Hub's usual cache."""
    device: str = "cpu"
    """Where to try it: cuda, mps or cpu."""
    json: bool = False
    """Print JSON."""


@dataclass(frozen=True)
class ApplySteeringConfig(Config):
    """Continue a prompt with and without a steering vector, taking the likeliest token each time."""

    vector: str
    """A name of a registry (`mechint list-steering`), user/repo of the Hub, or a local folder."""
    prompt: Annotated[tuple[str, ...], arg(aliases=["--prompts"])]
    """One or more prompts."""
    coefficient: Annotated[tuple[float, ...], arg(aliases=["--coefficients"])] = (1.0,)
    """How much of the vector is added, one text each; negative ones steer the other way."""
    unit: Literal["vector", "norm", "raw"] = "vector"
    """Of the coefficient. vector: the norm that the vector had before it was divided by it, so that 1 adds what was
    extracted. norm: the mean norm of the hook's activations. raw: activation units."""
    max_new_tokens: int = 80
    """Most tokens to add."""
    positions: Literal["all", "new"] = "all"
    """all: every position after BOS. new: the prompt's last position and what follows it."""
    revision: str | None = None
    """Branch, tag or commit of the repository; the newest if not given."""
    registry: Path | None = None
    """One more registry file, which counts most."""
    base_dir: Path | None = None
    """Where local paths of a registry count from; the current folder if not given."""
    model: Annotated[str | None, arg(aliases=["--model-name"])] = None
    """Model; the one that the vector names if not given."""
    layout: Literal["auto", "columns", "stacked"] = "auto"
    """How texts are shown; auto takes columns where the terminal is wide enough."""
    device: str | None = None
    """cuda, mps or cpu; the best that works if not given."""

    def __post_init__(self) -> None:
        require(bool(self.prompt), "give --prompt with a text")
        require(bool(self.coefficient), "give --coefficient with a number")
        for value in self.coefficient:
            require(math.isfinite(value), f"--coefficient should be a number, found {value}")
        require(self.max_new_tokens > 0, f"--max-new-tokens must be at least 1, found {self.max_new_tokens}")


@dataclass(frozen=True)
class PullConfig(Config):
    """Download a whole repository of the Hub into a folder, and check each file against the hash published with it.

    The folder appears when all is there and checked. An interrupted download goes on where it stopped.
    """

    repo: Positional[str]
    """Repository, user/repo."""
    output: Annotated[Path | None, arg(aliases=["-o"])] = None
    """Folder to write; the repository's name in the current folder if not given."""
    revision: str | None = None
    """Branch, tag or commit; the newest if not given."""
