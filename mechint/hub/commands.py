"""What the publish commands do: a bundle is built, shown or uploaded, and said in a line or two."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from mechint.config.publish import (
    PublishAllConfig,
    PublishInvestigationConfig,
    PublishSaeConfig,
    PublishSteeringConfig,
    UploadConfig,
)
from mechint.errors import MechintError, one_line
from mechint.hub.bundle import Bundle
from mechint.hub.investigation_bundle import WRITEUPS, find_artefacts, investigation_bundle, slugs
from mechint.hub.license import INVESTIGATION_LICENSE, SAE_LICENSE, front_matter_license
from mechint.hub.publish import Published, dry_run, publish
from mechint.hub.sae_bundle import artifact_bundle, artifact_dir, artifact_ids, sae_bundle
from mechint.hub.steering_bundle import steering_bundle, steering_repo_name
from mechint.huggingface.client import check_may_write
from mechint.huggingface.registry import STEERING_REGISTRY, local_place, steering_registry
from mechint.steering.direction import FILE_NAME, direction_path

STEERING_FOLDER = Path("steering")  # where `mechint extract-steering` writes


def publish_sae(config: PublishSaeConfig) -> int:
    """`mechint publish-sae`. Raises `MechintError` for a run that is not whole, and for what the Hub refuses."""
    if config.run_dir is not None:
        bundle = sae_bundle(config.run_dir, license=config.license)
    else:
        assert config.run_id is not None
        bundle = artifact_bundle(artifact_dir(config.artifact_root, config.run_id), license=config.license)
    show_or_send(bundle, config.repo, config)
    return 0


def publish_steering(config: PublishSteeringConfig) -> int:
    """`mechint publish-steering`. Raises `MechintError` for an unknown vector, and for what the Hub refuses."""
    bundle = steering_bundle(config.vector, license=config.license, base_dir=config.artifact_root)
    show_or_send(bundle, config.repo, config)
    return 0


def publish_investigation(config: PublishInvestigationConfig) -> int:
    """`mechint publish-investigation`. Raises `MechintError` for an unknown slug, and for what the Hub refuses."""
    bundle = investigation_bundle(config.slug, docs=config.docs, artefacts=config.artifact_root, license=config.license)
    print(find_artefacts(config.slug, config.docs, config.artifact_root).note)
    show_or_send(bundle, config.repo, config)
    return 0


def show_or_send(bundle: Bundle, repo_id: str, config: UploadConfig) -> Published | None:
    """The table of a dry run, or the upload and what came of it; None for a dry run."""
    if config.dry_run:
        dry_run(bundle, repo_id)
        return None
    done = publish(
        bundle,
        repo_id,
        create_repo=config.create_repo,
        private=config.private,
        commit_message=config.commit_message,
    )
    print(f"{'published' if done.changed else 'unchanged'}: {done.url}")
    print(f"commit: {done.commit}" + ("" if done.changed else "  (holds the same files already)"))
    return done


# --- everything at once -----------------------------------------------------------------------------------------------


class Item(NamedTuple):
    """One thing to publish: what it is called in messages, and how its bundle is made."""

    label: str
    bundle: Callable[[], Bundle]
    note: str | None = None


def publish_all(config: PublishAllConfig) -> int:
    """`mechint publish-all`: every item in turn; what fails is said and left out. 1 if anything did, else 0.

    Raises:
        MechintError: there is nothing to publish at all, or nothing of it could be: a licence that is none, no token.
    """
    front_matter_license(config.license)
    from huggingface_hub import get_token

    items = [*sae_items(config), *vector_items(config), *investigation_items(config)]
    if not items:
        looked = f"{config.artifact_root}/run-*, {STEERING_FOLDER}/, the registries, {config.docs / WRITEUPS}"
        raise MechintError(f"nothing to publish: no SAE run, steering vector or investigation in {looked}")
    if not config.dry_run and get_token() is None:
        check_may_write(f"{config.user}/all")  # says how to log in, once instead of for each item
    done: list[Published | None] = []
    skipped, used = 0, set()
    for item in items:
        try:
            bundle = item.bundle()
            repo_id = f"{config.user}/{repo_name(bundle)}"
            if repo_id in used:
                raise MechintError(f"another one goes to {repo_id} already: rename one of them")
            used.add(repo_id)
            if item.note is not None:
                print(item.note)
            done.append(show_or_send(bundle, repo_id, config))
        except (MechintError, OSError) as error:
            skipped += 1
            print(f"SKIP {item.label}: {one_line(error, 600)}", flush=True)
    if missing := vectors_elsewhere():
        print(f"not on this machine, left out: {', '.join(missing)}")
    if config.dry_run:
        print(f"Dry run complete. {len(done)} bundle(s) previewed, {skipped} skipped.")
    else:
        unchanged = sum(published is not None and not published.changed for published in done)
        same = f" ({unchanged} unchanged)" if unchanged else ""
        print(f"Publishing complete. {len(done)} bundle(s) published{same}, {skipped} skipped.")
    return 1 if skipped else 0


def repo_name(bundle: Bundle) -> str:
    """`sae-run51-gpt2-medium`, `sv-sentiment-gpt2-medium-l8`, `inv-sae-replication-crisis`."""
    return steering_repo_name(bundle.name) if bundle.kind == "steering" else bundle.name


def sae_items(config: PublishAllConfig) -> list[Item]:
    """The runs asked for, or all of the artifact folder; and the run directories that are named."""
    root, license = config.artifact_root, config.license or SAE_LICENSE

    def numbered(number: int) -> Item:
        return Item(f"run {number}", lambda: artifact_bundle(artifact_dir(root, number), license=license))

    def named(path: Path) -> Item:
        return Item(str(path), lambda: sae_bundle(path, license=license))

    return [*map(numbered, config.run_ids() or artifact_ids(root)), *map(named, config.run_dirs)]


def vector_items(config: PublishAllConfig) -> list[Item]:
    """The registry's vectors, and those in the folder that `mechint extract-steering` writes to."""

    def vector(name: str) -> Item:
        return Item(name, lambda: steering_bundle(name, license=config.license))

    known, elsewhere = steering_registry(), vectors_elsewhere()
    names = [name for name in known if name not in elsewhere]
    places = {place for name in names if (place := local_place(known[name])) is not None}
    covered = {direction_path(place).resolve() for place in places}
    folders = sorted(path.parent for path in STEERING_FOLDER.glob(f"*/{FILE_NAME}") if path.resolve() not in covered)
    return [vector(name) for name in (*names, *map(str, folders))]


def vectors_elsewhere() -> list[str]:
    """Names whose vector is not here and need not be: those that the package lists, and those that are on the Hub."""
    found = []
    for name, descriptor in steering_registry().items():
        place = local_place(descriptor)
        here = place is not None and direction_path(place).is_file()
        if not here and (descriptor.hf_repo is not None or STEERING_REGISTRY.get(name) is descriptor):
            found.append(name)
    return found


def investigation_items(config: PublishAllConfig) -> list[Item]:
    """Every writeup but the index."""
    license = config.license or INVESTIGATION_LICENSE

    def investigation(slug: str) -> Item:
        note = find_artefacts(slug, config.docs).note
        return Item(slug, lambda: investigation_bundle(slug, docs=config.docs, license=license), note)

    return [investigation(slug) for slug in slugs(config.docs)]
