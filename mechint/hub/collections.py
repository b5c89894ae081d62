"""Repositories into collections of the Hub: ones that exist, and ones that are made. Doing it again changes nothing."""

import re
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from mechint.config.publish_sweep import CollectionSpec
from mechint.errors import MechintError, nearest, one_line
from mechint.huggingface.client import hub_api, hub_errors, patiently, status_of, without_tokens

# What the Hub appends to the name of a collection.
SLUG_ID = re.compile(r"-[0-9a-f]{24}$")
# Characters that the Hub documents for a description; it says no limit for titles but has one.
MAX_DESCRIPTION = 150


class Added(NamedTuple):
    """What became of a collection."""

    slug: str
    url: str
    created: bool
    added: tuple[str, ...]  # repositories that were not in it


def collection_of(text: str, owner: str) -> CollectionSpec:
    """A `--collection`: `owner/name` is a slug, anything with a blank or without a slash a title of `owner`."""
    is_slug = re.fullmatch(r"[^\s/]+/[^\s/]+", text) is not None
    return CollectionSpec(slug=text) if is_slug else CollectionSpec(title=text, namespace=owner)


def add_to_collection(
    spec: CollectionSpec,
    repo_ids: Sequence[str],
    *,
    private: bool = False,
    token: str | None = None,
    endpoint: str | None = None,
) -> Added:
    """Add models to a collection; one with a title is made if its owner has none of that title (or short title).

    Raises:
        MechintError: a slug that is not there, a title or description that the Hub refuses (its words are given), no
            write access, the network. What was added before stays.
    """
    if spec.description is not None and len(spec.description) > MAX_DESCRIPTION:
        raise MechintError(
            f"collection {spec.title!r}: the Hub takes descriptions of at most {MAX_DESCRIPTION} characters, this one"
            f" has {len(spec.description)}"
        )
    api = hub_api(token, endpoint)
    collection, created = _open(api, spec, repo_ids, private, token)
    # list_collections shows four items a collection; this one has all
    present = {(item.item_type, item.item_id) for item in collection.items}
    added = []
    for repo_id in repo_ids:
        if ("model", repo_id) in present:
            continue
        with hub_errors(f"adding {repo_id} to the collection {collection.slug}", repo_id, token):
            patiently(
                f"adding {repo_id} to the collection",
                lambda repo_id=repo_id: api.add_collection_item(collection.slug, repo_id, "model", exists_ok=True),
            )
        added.append(repo_id)
    return Added(collection.slug, collection.url, created, tuple(added))


def _open(
    api: Any, spec: CollectionSpec, repo_ids: Sequence[str], private: bool, token: str | None
) -> tuple[Any, bool]:
    """`(the collection with all its items, whether it was made)`."""
    if spec.slug is not None:
        slug = spec.slug if SLUG_ID.search(spec.slug) else _full_slug(api, spec.slug, token)
        return _read(api, slug, token), False
    assert spec.title is not None
    owner = spec.namespace or repo_ids[0].split("/")[0]
    for found in _owned(api, owner, token):
        if found.title in (spec.title, spec.short_title):
            return _read(api, found.slug, token), False
    title, fallback = spec.title, spec.short_title
    while True:
        try:
            made = patiently(
                f"making the collection {title!r}",
                lambda title=title: api.create_collection(
                    title, namespace=owner, description=spec.description, private=private, exists_ok=True
                ),
            )
            return made, True
        except Exception as error:
            if status_of(error) != 400:
                with hub_errors(f"making the collection {title!r} of", f"{owner}/{title}", token):
                    raise
            said = one_line(without_tokens(getattr(error, "server_message", None) or error, token), 200)
            refused = f"the Hub refuses the collection's title {title!r} ({len(title)} characters): {said}"
            if fallback is None:
                raise MechintError(
                    f"{refused}. The repositories are published; give a shorter title and run the command again: it"
                    " only adds them to the collection"
                ) from None
            print(f"{refused}; making {fallback!r} instead", file=sys.stderr)
            title, fallback = fallback, None


def _read(api: Any, slug: str, token: str | None) -> Any:
    with hub_errors(f"reading the collection {slug}", None, token):
        try:
            return patiently(f"reading the collection {slug}", lambda: api.get_collection(slug))
        except Exception as error:
            if status_of(error) != 404:
                raise
            raise MechintError(
                f"collection {slug} is not on the Hub; give the slug as it ends the collection's address, or a title"
            ) from None


def _full_slug(api: Any, slug: str, token: str | None) -> str:
    """The slug with its id, of one that is given as `owner/name`."""
    owner = slug.split("/")[0]
    slugs = [found.slug for found in _owned(api, owner, token)]
    names = sorted({SLUG_ID.sub("", found) for found in slugs})
    matching = [found for found in slugs if SLUG_ID.sub("", found) == slug]
    if len(matching) != 1:
        many = f"fits several: {', '.join(matching)}" if matching else "is not on the Hub"
        raise MechintError(f"collection {slug} {many}; {nearest(slug, names) if names else f'{owner} has none'}")
    return matching[0]


def _owned(api: Any, owner: str, token: str | None) -> list[Any]:
    """All collections of a user or organisation."""
    with hub_errors(f"listing the collections of {owner}", None, token):
        return patiently(f"listing the collections of {owner}", lambda: list(api.list_collections(owner=owner)))
