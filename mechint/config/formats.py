"""Settings of `mechint convert`, `mechint identify` and `scripts/export_sae.py`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from mechint.config.base import Config, require


@dataclass(frozen=True)
class ConvertConfig(Config):
    """Write an SAE in another tool's format, and prove on probe vectors that it computes the same.

    What a format cannot say (a b_dec that is or is not subtracted, a constant input scale, decoder norms in a top-k) is
    folded into the weights; what no weights can say is refused. A certificate with the largest difference lies beside
    the output.
    """

    source: Positional[Path]
    """A file or folder in any format that `mechint identify` knows."""
    output: Positional[Path]
    """File or folder to write."""
    to: str = "mechint"
    """Format to write; docs/formats.md lists them."""
    from_format: Annotated[str | None, arg(name="from")] = None
    """Format of the source, where its files fit several."""
    overwrite: bool = False
    """Replace the output if it exists."""
    pad_topk: bool = False
    """For a topk in a format whose top-k keeps negative entries (saev, mech_platform): add k latents of zeros at the
    end, so that no negative entry is ever among the k largest. It computes the same; d_sae grows by k."""
    n_probes: int = 192
    """Probe vectors of the certificate."""
    seed: int = 0
    """Of the probe vectors."""

    def __post_init__(self) -> None:
        require(self.n_probes >= 12, "--n-probes must be at least 12")


@dataclass(frozen=True)
class IdentifyConfig(Config):
    """Say what an SAE's files are: format, architecture, widths, what is missing, and which models it would fit."""

    path: Positional[Path]
    """A file or folder."""
    json: bool = False
    """Print JSON."""


@dataclass(frozen=True)
class ExportConfig(Config):
    """Write a run's SAE in another tool's format, with a certificate that it computes the same."""

    run_dir: Path
    """The run directory."""
    format: str = "saelens"
    """Format to write; docs/formats.md lists them."""
    output: Annotated[Path | None, arg(aliases=["-o"])] = None
    """File or folder to write; exports/FORMAT in the run directory if not given."""
    overwrite: bool = False
    """Replace the output if it exists."""
    pad_topk: bool = False
    """For a topk in a format whose top-k keeps negative entries (saev, mech_platform): add k latents of zeros at the
    end. It computes the same; d_sae grows by k."""
