"""Collections of the loopback Hub: lists of repositories with a title, by owner."""

import hashlib
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from loopback_api import Reply, Request, route
from loopback_store import HubError

if TYPE_CHECKING:
    from loopback_hub import LoopbackHub

LONGEST_TITLE, LONGEST_DESCRIPTION, LONGEST_NOTE = 60, 150, 500  # characters; more is answered with 400


@dataclass
class Collection:
    slug: str
    title: str
    owner: str
    private: bool = False
    description: str = ""
    items: list[dict[str, Any]] = field(default_factory=list)

    def shown(self) -> dict[str, Any]:
        owner = {"_id": "1", "name": self.owner, "type": "user", "avatarUrl": "", "fullname": self.owner}
        items = [{**item, "position": i} for i, item in enumerate(self.items)]
        kept = {"slug": self.slug, "title": self.title, "owner": owner, "items": items, "private": self.private}
        kept |= {"description": self.description, "theme": "orange", "upvotes": 0, "position": 0}
        return kept | {"lastUpdated": "2025-01-01T00:00:00.000Z", "gating": False}


def _slug(owner: str, title: str) -> str:
    """The Hub's form, with an id from the content so that tests see the same one each time."""
    words = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
    return f"{owner}/{words}-{hashlib.sha1(f'{owner}/{title}'.encode()).hexdigest()[:24]}"


def _too_long(what: str, text: str, longest: int) -> None:
    if len(text) > longest:
        raise HubError(400, None, f'"{what}" length must be less than or equal to {longest} characters long')


@route("POST", "/api/collections")
def create_collection(hub: "LoopbackHub", request: Request, found: dict[str, str]) -> Reply:
    asked = request.json()
    caller = hub.caller(request)
    owner, title = asked.get("namespace") or (caller.user if caller else ""), asked.get("title", "")
    if caller is None:
        raise HubError(401, None, "Invalid username or password.")
    if not caller.may_write(owner):
        raise HubError(403, None, f'You don\'t have the rights to create a collection under the namespace "{owner}"')
    if not title:
        raise HubError(400, None, '"title" is not allowed to be empty')
    _too_long("title", title, LONGEST_TITLE)
    _too_long("description", asked.get("description") or "", LONGEST_DESCRIPTION)
    slug = _slug(owner, title)
    if slug in hub.collections:
        raise HubError(409, None, "You already have a collection with this title", body={"slug": slug})
    made = Collection(slug, title, owner, bool(asked.get("private")), asked.get("description") or "")
    hub.collections[slug] = made
    return Reply(made.shown())


def _collection(hub: "LoopbackHub", request: Request, slug: str, *, write: bool = False) -> Collection:
    caller = hub.caller(request)
    collection = hub.collections.get(slug)
    mine = collection is not None and caller is not None and caller.may_write(collection.owner)
    if collection is None or (collection.private and not mine):
        raise HubError(404, None, "Collection not found")
    if write and caller is None:
        raise HubError(401, None, "Invalid username or password.")
    if write and not mine:
        raise HubError(403, None, "You don't have the rights to edit this collection")
    return collection


@route("GET", "/api/collections")
def list_collections(hub: "LoopbackHub", request: Request, found: dict[str, str]) -> Reply:
    caller, owner = hub.caller(request), request.query.get("owner")
    seen = [
        {key: value for key, value in collection.shown().items() if key != "position"}
        for collection in hub.collections.values()
        if (owner is None or collection.owner == owner)
        and (not collection.private or (caller is not None and caller.may_write(collection.owner)))
    ]
    return Reply(seen)


@route("GET", "/api/collections/(?P<slug>[^/]+/[^/]+)")
def get_collection(hub: "LoopbackHub", request: Request, found: dict[str, str]) -> Reply:
    return Reply(_collection(hub, request, found["slug"]).shown())


@route("DELETE", "/api/collections/(?P<slug>[^/]+/[^/]+)")
def delete_collection(hub: "LoopbackHub", request: Request, found: dict[str, str]) -> Reply:
    del hub.collections[_collection(hub, request, found["slug"], write=True).slug]
    return Reply({})


@route("POST", "/api/collections/(?P<slug>[^/]+/[^/]+)/items")
def add_item(hub: "LoopbackHub", request: Request, found: dict[str, str]) -> Reply:
    collection = _collection(hub, request, found["slug"], write=True)
    asked = request.json()
    item, note = asked["item"], asked.get("note")
    _too_long("note", note or "", LONGEST_NOTE)
    if item["type"] in ("model", "dataset", "space"):
        hub.repo(request, item["type"], item["id"])
    if any((have["id"], have["type"]) == (item["id"], item["type"]) for have in collection.items):
        raise HubError(409, None, f"{item['id']} is already in this collection")
    name = hashlib.sha1(f"{collection.slug} {item['type']} {item['id']}".encode()).hexdigest()[:24]
    collection.items.append({"_id": name, **item} | ({"note": {"html": note, "text": note}} if note else {}))
    return Reply(collection.shown())


@route("DELETE", "/api/collections/(?P<slug>[^/]+/[^/]+)/items/<item>")
def delete_item(hub: "LoopbackHub", request: Request, found: dict[str, str]) -> Reply:
    collection = _collection(hub, request, found["slug"], write=True)
    before = len(collection.items)
    collection.items = [item for item in collection.items if item["_id"] != found["item"]]
    if len(collection.items) == before:
        raise HubError(404, None, "Item not found in this collection")
    return Reply({})
