"""Settings of `mechint publish-sweep`, and the file that describes multi-checkpoint repositories."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from mechint.config.base import Config, require
from mechint.config.publish import check_repo_id

Objective = Literal["any", "matryoshka", "vanilla"]
Activation = Literal["any", "relu", "top-k", "batch-top-k"]
SweepFormat = Literal["saelens", "saev"]


@dataclass(frozen=True)
class PublishSweepConfig(Config):
    """Publish the best checkpoints of a sweep: one repository, a folder layer_N/RUN for each checkpoint.

    Of each layer the Pareto frontier of L0 against NMSE goes up, at most --max-per-layer of it: the sparsest, the
    densest, and what lies nearest to equal steps of log L0 between them.

    Give a sweep of `mechint sweep` with --repo USER/NAME; or --repos FILE.json, which describes one or several
    repositories whose runs stand in sweep files and on Weights & Biases (docs/publish.md). --dry-run shows everything,
    the figure of the choice too, and uploads nothing. The token comes from HF_TOKEN, the key of W&B from WANDB_API_KEY.
    """

    sweep: Positional[Path | None] = None
    """Folder of a sweep, as `mechint sweep` makes it."""
    repo: str | None = None
    """Repository for that sweep: USER/NAME or ORGANISATION/NAME."""
    repos: Path | None = None
    """JSON file that describes the repositories, such as examples/dinov3.json."""
    only: tuple[str, ...] = ()
    """Of --repos, only the repositories with these names."""
    dry_run: bool = False
    """Show what would be uploaded, and upload nothing."""
    max_per_layer: int = 6
    """Checkpoints of a layer, at most."""
    format: SweepFormat = "saelens"
    """Layout of a sweep's checkpoints: folders that SAELens opens, or saev's sae.pt where it can hold the SAE."""
    license: str | None = None
    """Licence; that of --repos if not given, else research-only."""
    title: str | None = None
    """Heading of the README of a sweep's repository."""
    metrics: Path | None = None
    """JSON file with the runs' configs and metrics, in place of Weights & Biases."""
    save_metrics: Path | None = None
    """Write what Weights & Biases said there, for a later --metrics."""
    wandb_entity: str | None = None
    """Entity on Weights & Biases, in place of the one in --repos."""
    wandb_project: str | None = None
    """Project on Weights & Biases, in place of the one in --repos."""
    runs_root: Path | None = None
    """Folder of the runs' folders, in place of the one in --repos."""
    sweeps_root: Path | None = None
    """Folder that the sweep files in --repos are relative to; the current one if neither says."""
    output: Annotated[Path, arg(aliases=["-o"])] = Path("published")
    """Folder for the README.md, manifest.jsonl and selection.png of each repository, to be looked at."""
    collection: tuple[str, ...] = ()
    """Collections to add the repositories to: a slug (owner/name-0123...), or a title, made if there is none."""
    private: bool = False
    """Make new repositories private. Those that exist stay as they are."""
    create_repo: bool = True
    """Make repositories that do not exist."""
    commit_message: Annotated[str | None, arg(aliases=["-m"])] = None
    """Message of each commit; says what was uploaded if not given."""

    def __post_init__(self) -> None:
        sources = [self.sweep is not None, self.repos is not None]
        require(sum(sources) == 1, "give one of a sweep's folder (with --repo USER/NAME) and --repos FILE.json")
        require(
            self.max_per_layer >= 2, f"--max-per-layer must be at least 2 (both ends stay), got {self.max_per_layer}"
        )
        if self.sweep is not None:
            require(self.repo is not None, "--repo USER/NAME: the repository that the sweep goes to")
            check_repo_id(self.repo or "")
            others = {
                "--only": self.only,
                "--metrics": self.metrics,
                "--save-metrics": self.save_metrics,
                "--wandb-entity": self.wandb_entity,
                "--wandb-project": self.wandb_project,
                "--runs-root": self.runs_root,
                "--sweeps-root": self.sweeps_root,
            }
        else:
            others = {"--repo": self.repo, "--title": self.title}
            require(
                self.format == "saelens", "--format is for a sweep's folder: --repos publishes the files as they are"
            )
        given = [flag for flag, value in others.items() if value]
        other = "--repos" if self.sweep is not None else "a sweep's folder"
        require(not given, f"{', '.join(given)} goes with {other}; leave it out")


@dataclass(frozen=True)
class RepoSpec(Config):
    """One multi-checkpoint repository: which runs it is chosen from, and what they must be."""

    repo: str
    title: str = ""
    description: str = ""
    sweep_file: str | None = None
    tables: tuple[str, ...] = ()
    run_ids: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()
    d_model: int | None = None
    d_sae: int | None = None
    objective: Objective = "any"
    activation: Activation = "any"
    tags: tuple[str, ...] = ()
    base_model: str | None = None
    datasets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_repo_id(self.repo)
        require(bool(self.sweep_file or self.run_ids), f"{self.repo}: give sweep_file, or run_ids")

    @property
    def name(self) -> str:
        return self.repo.split("/")[1]


@dataclass(frozen=True)
class CollectionSpec(Config):
    """A collection of the Hub: by its slug one that exists, by its title one that is made if it does not.

    `short_title` is taken where the Hub refuses the title as too long; it does not document how long is too long.
    """

    slug: str | None = None
    title: str | None = None
    short_title: str | None = None
    namespace: str | None = None
    description: str | None = None

    def __post_init__(self) -> None:
        one = sum([self.slug is not None, self.title is not None]) == 1
        require(one, "a collection has either a slug (it exists) or a title (it is made if it does not)")
        slug = self.slug or "owner/name"
        require(slug.count("/") == 1 and all(slug.split("/")), f"collection slug {slug!r} should be owner/name")


@dataclass(frozen=True)
class ReposFile(Config):
    """What a file for --repos says beside its `repos`, `links` and `collections`. `runs_root` may hold $VARIABLES."""

    license: str = "mit"
    runs_root: str = "runs"
    checkpoint: str = "checkpoint/sae.pt"
    sweeps_root: str | None = None
    run_id_pattern: str | None = None
    wandb_entity: str | None = None
    wandb_project: str | None = None
