"""`mechint publish-sweep`: the Pareto frontier of a sweep as a repository of checkpoints, or several such at once."""

import contextlib
import inspect
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mechint.cli.flags import command, parse
from mechint.config.publish_sweep import CollectionSpec, PublishSweepConfig
from mechint.errors import MechintError, nearest

if TYPE_CHECKING:
    from mechint.hub.multi import Repositories, Repository

SWEEP_LICENSE = "research-only"


@command
def main(argv: Sequence[str]) -> int:
    config = parse(
        PublishSweepConfig, argv, prog="mechint publish-sweep", description=inspect.getdoc(PublishSweepConfig)
    )
    progress = sys.stderr.isatty()
    from mechint.hub.multi_bundle import FIGURE, write_preview

    with _prepared(config, progress) as (repositories, collections):
        for repository in repositories:
            folder = config.output / repository.spec.repo.replace("/", "--")
            write_preview(repository, folder)
            _tell(repository)
            print(f"figure: {folder / FIGURE}\n")
        if config.dry_run:
            _show(repositories, collections)
        else:
            _publish(config, repositories, collections, progress)
    for repository in repositories:
        for run_id, reason in repository.gathered.skipped.items():
            print(f"left out of {repository.spec.repo}: {run_id}: {reason}", file=sys.stderr)
    return 0


@contextlib.contextmanager
def _prepared(
    config: PublishSweepConfig, progress: bool
) -> Iterator[tuple[list["Repository"], tuple[CollectionSpec, ...]]]:
    """The repositories, chosen and checked, and the collections they go to; files made for them go with the block."""
    from mechint.hub.collections import collection_of

    if config.sweep is not None:
        from mechint.hub.sweep_members import choose_members, convert_members

        assert config.repo is not None
        _check_login(config, [config.repo])
        repository = choose_members(
            config.sweep,
            config.repo,
            max_per_layer=config.max_per_layer,
            format=config.format,
            license=config.license or SWEEP_LICENSE,
            title=config.title,
        )
        _warn(repository)
        collections = tuple(collection_of(text, config.repo.split("/")[0]) for text in config.collection)
        with tempfile.TemporaryDirectory(prefix="mechint-sweep-") as scratch:
            yield [convert_members(repository, config.sweep, Path(scratch), progress=progress)], collections
        return

    from mechint.hub.multi import read_repositories

    assert config.repos is not None
    described = read_repositories(config.repos)
    repositories = _from_file(config, described, progress)
    owner = repositories[0].spec.repo.split("/")[0]
    yield repositories, (*described.collections, *(collection_of(text, owner) for text in config.collection))


def _from_file(config: PublishSweepConfig, described: "Repositories", progress: bool) -> list["Repository"]:
    """The repositories of --repos: run ids, then metrics, then the choice, then the checkpoints."""
    from mechint.hub.metrics_source import from_wandb, read_records, write_records
    from mechint.hub.multi import choose, preflight, run_ids_of

    settings = described.settings
    specs = described.repos
    if config.only:
        names = [name for spec in specs for name in (spec.repo, spec.name)]
        for name in config.only:
            if name not in names:
                raise MechintError(f"--only {name!r} is not in {config.repos}; {nearest(name, names)}")
        specs = tuple(spec for spec in specs if {spec.repo, spec.name} & set(config.only))
    _check_login(config, [spec.repo for spec in specs])
    sweeps_root = config.sweeps_root or Path(os.path.expandvars(settings.sweeps_root or "."))
    runs_root = config.runs_root or Path(os.path.expandvars(settings.runs_root))
    ids = {spec.repo: run_ids_of(spec, sweeps_root, settings.run_id_pattern) for spec in specs}
    if config.metrics is not None:
        records = read_records(config.metrics)
    else:
        entity, project = config.wandb_entity or settings.wandb_entity, config.wandb_project or settings.wandb_project
        if project is None:
            raise MechintError("give the source of the metrics: --metrics FILE.json, or --wandb-project NAME")
        every = [run_id for found in ids.values() for run_id in found]
        records = from_wandb(every, f"{entity}/{project}" if entity else project, progress=progress)
    if config.save_metrics is not None:
        write_records(config.save_metrics, records)
    repositories = [
        choose(
            spec,
            ids[spec.repo],
            records,
            max_per_layer=config.max_per_layer,
            license=config.license or settings.license,
            links=described.links,
        )
        for spec in specs
    ]
    for repository in repositories:
        _warn(repository)
    return [preflight(repository, runs_root, settings.checkpoint, progress=progress) for repository in repositories]


def _check_login(config: PublishSweepConfig, repos: Sequence[str]) -> None:
    """Who may not write there should know before anything is read."""
    if not config.dry_run:
        from mechint.huggingface.client import check_may_write

        for repo in repos:
            check_may_write(repo)


def _warn(repository: "Repository") -> None:
    from mechint.hub.multi import missing_layers

    for run_id, reason in repository.gathered.skipped.items():
        print(f"warning: {repository.spec.repo}: run {run_id} is left out: {reason}", file=sys.stderr)
    for layer in missing_layers(repository):
        print(f"warning: {repository.spec.repo}: no run of layer {layer} is left", file=sys.stderr)


def _tell(repository: "Repository") -> None:
    """What was chosen, in a line a layer."""
    from mechint.hub.multi_card import error_text

    gathered = repository.gathered
    print(
        f"{repository.spec.repo}: {len(repository.checkpoints)} chosen of {len(gathered.candidates)} runs;"
        f" {len(gathered.filtered)} of another kind, {len(gathered.skipped)} left out"
    )
    for layer, chosen in repository.chosen.items():
        points = "  ".join(f"{c.run_id} {c.l0:.1f}/{error_text(c.nmse)}" for c in chosen)
        print(f"  layer {layer} (L0/NMSE): {points}")


def _show(repositories: Sequence["Repository"], collections: Sequence[CollectionSpec]) -> None:
    from mechint.hub.multi_bundle import bundle_of
    from mechint.hub.publish import dry_run

    for repository in repositories:
        dry_run(bundle_of(repository), repository.spec.repo)
    names = ", ".join(repository.spec.repo for repository in repositories)
    for spec in collections:
        what = f"existing collection {spec.slug}" if spec.slug else f"collection {spec.title!r} (made if there is none)"
        print(f"{what}: would hold {names}")


def _publish(
    config: PublishSweepConfig,
    repositories: Sequence["Repository"],
    collections: Sequence[CollectionSpec],
    progress: bool,
) -> None:
    """Upload and check each repository, then add all to the collections."""
    from mechint.hub.collections import add_to_collection
    from mechint.hub.multi_bundle import bundle_of
    from mechint.hub.publish import publish

    for repository in repositories:
        done = publish(
            bundle_of(repository),
            repository.spec.repo,
            create_repo=config.create_repo,
            private=config.private,
            commit_message=config.commit_message,
            progress=progress,
        )
        what = "published" if done.changed else "unchanged"
        print(f"{what}: {done.url} (commit {done.commit[:12]}), {len(repository.checkpoints)} checkpoints", flush=True)
    faults = []
    for spec in collections:
        try:
            found = add_to_collection(
                spec, [repository.spec.repo for repository in repositories], private=config.private
            )
        except MechintError as error:  # the other collections can still be filled
            faults.append(str(error))
            continue
        state = "made" if found.created else "exists"
        print(f"collection: {found.url} ({state}), {len(found.added)} added", flush=True)
    if faults:
        raise MechintError("; ".join(faults))
