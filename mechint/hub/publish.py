"""A bundle into a repository of the Hub: the plan, the dry run, the one commit, the check afterwards."""

from typing import NamedTuple

from mechint.hub.bundle import Bundle


class Row(NamedTuple):
    """One line of the table of a dry run."""

    staged_name: str
    source: str  # relative to the current folder; "(generated)"; "missing"
    size: int | None  # bytes; None when missing


class Published(NamedTuple):
    url: str  # of the repository
    commit: str  # the commit that holds the bundle: the new one, or the head that held it already
    changed: bool  # False: the same content was there, nothing was committed


def plan(bundle: Bundle, repo_id: str) -> list[Row]:
    """The files that would go up, README.md and bundle_metadata.json first. No network."""
    raise NotImplementedError


def dry_run(bundle: Bundle, repo_id: str) -> None:
    """Print the panel and the table of what would be uploaded, to standard output. No network, no credentials."""
    raise NotImplementedError


def publish(
    bundle: Bundle,
    repo_id: str,
    *,
    create_repo: bool = True,
    private: bool = False,
    commit_message: str | None = None,
    revision: str = "main",
    token: str | None = None,
    endpoint: str | None = None,
    repo_type: str = "model",
) -> Published:
    """Upload a bundle in one commit, then check what arrived."""
    raise NotImplementedError
