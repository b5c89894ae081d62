"""Settings of the report."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from mechint.config.base import Config, require


@dataclass(frozen=True)
class ReportConfig(Config):
    """Write one HTML file about a finished run, or about several side by side: what was trained on what, how good it
    is, what each latent does. Opens in any browser, without a server and without the network."""

    runs: Positional[tuple[Path, ...]]
    """Run directories, or other SAEs: anything that `mechint identify` knows. One of ours: the report lies in it.
    Several, or one of others: give --output."""
    output: Annotated[Path | None, arg(aliases=["-o"])] = None
    """HTML file to write; report.html in the run if not given."""
    overwrite: bool = False
    """Replace the report and the figures if they exist."""
    figures: bool = True
    """Also write the run's figures/*.png and *.csv; never for several runs."""
    activations_path: str | None = None
    """Activations to look at the latents on; the run's own if not given. An SAE that is no run needs them."""
    model: str | None = None
    """Language model for promoted tokens and the spelling of tokens; the one that the run names if not given."""
    top_contexts: int = 8
    """Strongest contexts shown for each latent."""
    quantile_contexts: int = 2
    """Contexts shown for each of the quantile ranges of a latent's activations."""
    window: int = 12
    """Tokens shown before and after the one that a latent fires on."""
    max_megabytes: float = 5.0
    """Largest file; fewer contexts are kept of each latent until it fits."""
    device: str | None = None
    """cuda, mps or cpu; the best that works if not given."""

    def __post_init__(self) -> None:
        require(len(self.runs) > 0, "no run given: mechint report runs/NAME")
        for name in ("top_contexts", "window"):
            require(getattr(self, name) >= 1, f"--{name.replace('_', '-')} must be at least 1")
        require(self.window <= 60, "--window must be at most 60")
        require(self.quantile_contexts >= 0, "--quantile-contexts must not be negative")
        require(self.max_megabytes >= 0.5, "--max-megabytes must be at least 0.5")
        several = "several runs: give --output for the file that compares them"
        require(len(self.runs) == 1 or self.output is not None, several)
