"""Settings of the publish commands: one repository each for an SAE, a steering vector, an investigation, or all."""

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from mechint.config.base import Config, require


def check_repo_id(repo: str, flag: str = "--repo") -> None:
    """Raise `MechintError` unless `repo` is `user/name` as the Hub allows it."""
    parts = repo.split("/")
    require(
        len(parts) == 2 and all(map(_is_name, parts)) and len(repo) <= 96,
        f"{flag} {repo!r} should be user/name: letters, digits, '-', '_' and '.', no '-' or '.' at the start or end or"
        " twice in a row, 96 characters at most",
    )


def _is_name(part: str) -> bool:
    plain = bool(part) and all(char.isascii() and (char.isalnum() or char in "-_.") for char in part)
    return plain and part[0] not in "-." and part[-1] not in "-." and "--" not in part and ".." not in part


@dataclass(frozen=True, kw_only=True)
class UploadConfig(Config):
    """What all publish commands can be told."""

    dry_run: bool = False
    """Print what would be uploaded, and upload nothing. Needs no account and no network."""
    private: bool = False
    """Make a new repository private. One that exists stays as it is."""
    create_repo: bool = True
    """Make the repository if it does not exist."""
    commit_message: str | None = None
    """Message of the commit; says what was uploaded if not given."""


@dataclass(frozen=True, kw_only=True)
class PublishSaeConfig(UploadConfig):
    """Publish an SAE to the Hugging Face Hub: one repository, one commit, checked after the upload.

    Give a run directory of `mechint train` (--run-dir), or the number of a run in the artifact folder (--run-id 51 is
    artifacts/run-000051). Log in once with `hf auth login`, or set HF_TOKEN.
    """

    repo: str
    """Repository: USER/NAME or ORGANISATION/NAME."""
    run_id: int | None = None
    """Number of a run in the artifact folder."""
    run_dir: Path | None = None
    """A run directory, in place of --run-id."""
    artifact_root: Path = Path("artifacts")
    """Folder of the runs that --run-id counts."""
    license: str = "research-only"
    """Licence of the weights: an identifier of the Hub (MIT, apache-2.0, CC-BY-4.0 ...) or any other name."""

    def __post_init__(self) -> None:
        check_repo_id(self.repo)
        given = [self.run_id is not None, self.run_dir is not None]
        require(sum(given) == 1, "give one of --run-id N (of the artifact folder) and --run-dir DIR (a run directory)")
        require(self.run_id is None or self.run_id >= 0, f"--run-id must not be negative, got {self.run_id}")


@dataclass(frozen=True, kw_only=True)
class PushRunConfig(UploadConfig):
    """Publish a run directory to the Hugging Face Hub: `mechint publish-sae --run-dir`, with the directory first."""

    run_dir: Positional[Path]
    """A run directory of `mechint train`, or a folder run-NNNNNN of artifacts."""
    repo: str
    """Repository: USER/NAME or ORGANISATION/NAME."""
    license: str = "research-only"
    """Licence of the weights: an identifier of the Hub (MIT, apache-2.0, CC-BY-4.0 ...) or any other name."""

    def __post_init__(self) -> None:
        check_repo_id(self.repo)


@dataclass(frozen=True, kw_only=True)
class PublishSteeringConfig(UploadConfig):
    """Publish a steering vector to the Hugging Face Hub: direction.safetensors with its sidecar, in one commit."""

    vector: str
    """A name of `mechint list-steering`, or a folder or file: steering/NAME, .../direction.safetensors."""
    repo: str
    """Repository: USER/NAME or ORGANISATION/NAME."""
    artifact_root: Path | None = None
    """Folder that the registry's local paths are relative to; the current one if not given."""
    license: str | None = None
    """Licence; the one that the registry or the sidecar states if not given, else research-only."""

    def __post_init__(self) -> None:
        check_repo_id(self.repo)


@dataclass(frozen=True, kw_only=True)
class PublishInvestigationConfig(UploadConfig):
    """Publish an investigation: its writeup as investigation.md, and its artefacts, each under its own name.

    The writeup is docs/investigations/SLUG.md; the artefacts are those in docs/publications/SLUG_artifacts/, else
    docs/publications/SLUG/, with the folders inside.
    """

    slug: str
    """File name of the writeup without .md."""
    repo: str
    """Repository: USER/NAME or ORGANISATION/NAME."""
    docs: Path = Path("docs")
    """Folder that holds investigations/ and publications/."""
    artifact_root: Path | None = None
    """Folder of the artefacts, in place of those in publications/."""
    license: str = "CC-BY-4.0"
    """Licence of the text and its artefacts."""

    def __post_init__(self) -> None:
        check_repo_id(self.repo)


@dataclass(frozen=True, kw_only=True)
class PublishAllConfig(UploadConfig):
    """Publish every SAE run, steering vector and investigation, each into a repository of its own below --user.

    Runs are those of the artifact folder, and the run directories that --run-dirs names; vectors those of the
    registries and of steering/; investigations those of docs/. What cannot be published is named and left out; the
    others go on, and the exit status is then 1.
    """

    user: str
    """User or organisation that the repositories belong to."""
    sae_run_ids: str = ""
    """Runs of the artifact folder, "51,52"; all that hold weights if not given."""
    run_dirs: tuple[Path, ...] = ()
    """Run directories of `mechint train` to publish too."""
    artifact_root: Path = Path("artifacts")
    """Folder of the runs."""
    docs: Path = Path("docs")
    """Folder that holds investigations/ and publications/."""
    license: str | None = None
    """Licence of everything; that of each kind (research-only, the vector's own, CC-BY-4.0) if not given."""

    def __post_init__(self) -> None:
        require(_is_name(self.user), f"--user {self.user!r} should be the name of a user or organisation, without '/'")
        self.run_ids()

    def run_ids(self) -> tuple[int, ...]:
        """The numbers of --sae-run-ids."""
        words = [word for word in self.sae_run_ids.replace(",", " ").split() if word]
        require(
            all(word.isascii() and word.isdigit() for word in words),
            f"--sae-run-ids {self.sae_run_ids!r} should be numbers with commas between them, such as 51,52",
        )
        return tuple(dict.fromkeys(int(word) for word in words))
