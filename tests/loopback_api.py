"""The HTTP interface of the loopback Hub (`loopback_hub.py`): what each path answers, as
huggingface_hub 2.4 expects it.

A handler takes the hub, the request and what the path held, and returns a `Reply` or raises `HubError`.
"""

import base64
import hashlib
import json
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import parse_qs, quote, unquote

from loopback_card import card_errors
from loopback_store import Blob, HubError, Repo, git_sha1, goes_to_lfs, pointer

if TYPE_CHECKING:
    from loopback_hub import LoopbackHub


class Request(NamedTuple):
    """One request as the server saw it. `body` is dropped from the log; `size` is its length in bytes."""

    method: str  # of a request that is not for this server: "OUTSIDE"
    path: str  # unquoted, without the query
    query: dict[str, str]
    headers: dict[str, str]  # names in lower case
    size: int
    status: int = 0
    body: bytes = b""

    def json(self) -> Any:
        return json.loads(self.body or b"{}")


class Reply(NamedTuple):
    body: bytes | dict | list = b""
    status: int = 200
    headers: dict[str, str] = {}  # noqa: RUF012


Route = Callable[["LoopbackHub", Request, dict[str, str]], Reply]
ROUTES: list[tuple[str, re.Pattern[str], Route]] = []


REPO_NAME = re.compile(r"(?!.*(?:--|\.\.))(?![-.])[A-Za-z0-9._-]{1,96}(?<![-.])(?<!\.git)(?<!\.ipynb)")
SEGMENTS = {
    "api_repo": r"(?P<kind>models|datasets|spaces)/(?P<repo>[^/]+(?:/[^/]+)??)",
    "repo": r"(?:(?P<kind>datasets|spaces)/)?(?P<repo>[^/]+(?:/[^/]+)??)",
    "rev": r"(?P<rev>refs/convert/[^/]+|refs/pr/\d+|[^/]+)",
    "rest": r"(?P<rest>.*)",
}


def route(methods: str, pattern: str) -> Callable[[Route], Route]:
    """Register a handler. In `pattern`, <name> stands for one path segment or for a group of SEGMENTS; segments are
    unquoted after matching, and the repository's type is added as `type`."""

    def group(match: re.Match[str]) -> str:
        return SEGMENTS.get(match[1], rf"(?P<{match[1]}>[^/]+)")

    compiled = re.compile(re.sub(r"(?<!\?P)<(\w+)>", group, pattern))

    def register(handler: Route) -> Route:
        ROUTES.extend((method, compiled, handler) for method in methods.split())
        return handler

    return register


def answer(hub: "LoopbackHub", request: Request, raw_path: str) -> Reply:
    for method, pattern, handler in ROUTES:
        if method == request.method and (match := pattern.fullmatch(raw_path)):
            found = {name: unquote(value) for name, value in match.groupdict().items() if value is not None}
            found["type"] = found.pop("kind", "models").removesuffix("s")
            with hub.lock:
                return handler(hub, request, found)
    raise HubError(404, None, f"the loopback hub has no {request.method} {request.path}")


@route("GET", "/api/whoami-v2")
def whoami(hub: "LoopbackHub", request: Request, found: dict[str, str]) -> Reply:
    caller = hub.caller(request)
    if caller is None:
        raise HubError(401, None, "Invalid username or password.")
    orgs = [{"type": "org", "name": name, "fullname": name, "roleInOrg": role} for name, role in caller.orgs.items()]
    access: dict[str, Any] = {"displayName": "loopback", "role": caller.role}
    if caller.role == "fineGrained":
        scoped = [
            {
                "entity": {"_id": name, "type": "user" if name == caller.user else "org", "name": name},
                "permissions": rights,
            }
            for name, rights in caller.scopes.items()
        ]
        access["fineGrained"] = {"canReadGatedRepos": False, "global": [], "scoped": scoped}
    auth = {"type": "access_token", "accessToken": access}
    reply = {
        "type": "user",
        "id": caller.user,
        "name": caller.user,
        "fullname": caller.user,
        "orgs": orgs,
        "auth": auth,
    }
    return Reply(reply)


@route("GET", "/api/<api_repo>(?:/revision/<rev>)?")
def repo_info(hub: "LoopbackHub", request: Request, found: dict[str, str]) -> Reply:
    repo = hub.repo(request, found["type"], found["repo"])
    commit = repo.at(found.get("rev", "main"))
    siblings = []
    for path, blob in sorted(commit.files.items()):
        sibling: dict[str, Any] = {"rfilename": path}
        if "blobs" in request.query:
            sibling |= {"size": blob.size, "blobId": blob.oid}
            if blob.lfs:
                sibling["lfs"] = {"size": blob.size, "sha256": blob.sha256, "pointerSize": blob.pointer_size}
        siblings.append(sibling)
    info = {"id": repo.id, "author": repo.id.split("/")[0], "sha": commit.sha, "lastModified": commit.date}
    info |= {"private": repo.private, "gated": "manual" if repo.gated else False, "disabled": False, "tags": []}
    return Reply(info | {"modelId": repo.id, "downloads": 0, "likes": 0, "siblings": siblings})


@route("GET", "/api/<api_repo>/tree/<rev>(?:/<rest>)?")
def tree(hub: "LoopbackHub", request: Request, found: dict[str, str]) -> Reply:
    repo = hub.repo(request, found["type"], found["repo"], files=True)
    recursive = request.query.get("recursive", "").lower() in ("true", "1")
    entries = repo.entries(found["rev"], found.get("rest", "").strip("/"), recursive)
    start = int(request.query.get("cursor", 0))
    end = start + hub.page_size
    more = f"{hub.endpoint}{quote(request.path)}?recursive={recursive}&cursor={end}"
    return Reply(entries[start:end], headers={"Link": f'<{more}>; rel="next"'} if end < len(entries) else {})


@route("POST", "/api/<api_repo>/paths-info/<rev>")
def paths_info(hub: "LoopbackHub", request: Request, found: dict[str, str]) -> Reply:
    repo = hub.repo(request, found["type"], found["repo"], files=True)
    entries = {entry["path"]: entry for entry in repo.entries(found["rev"], recursive=True)}
    wanted = parse_qs(request.body.decode()).get("paths", [])
    return Reply([entries[path] for path in wanted if path in entries])


@route("GET", "/api/<api_repo>/refs")
def refs(hub: "LoopbackHub", request: Request, found: dict[str, str]) -> Reply:
    repo = hub.repo(request, found["type"], found["repo"])
    kinds = {"branches": "refs/heads/", "converts": "refs/convert/", "tags": "refs/tags/", "pullRequests": "refs/pr/"}
    return Reply(
        {
            kind: [
                {"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": sha}
                for ref, sha in sorted(repo.refs.items())
                if ref.startswith(prefix)
            ]
            for kind, prefix in kinds.items()
        }
    )


@route("GET", "/api/<api_repo>/commits/<rev>")
def commits(hub: "LoopbackHub", request: Request, found: dict[str, str]) -> Reply:
    history = hub.repo(request, found["type"], found["repo"]).history(found["rev"])
    authors = [{"user": hub.user}]
    return Reply([{"id": c.sha, "title": c.title, "message": "", "authors": authors, "date": c.date} for c in history])


@route("GET HEAD", "/<repo>/resolve/<rev>/<rest>")
def resolve(hub: "LoopbackHub", request: Request, found: dict[str, str]) -> Reply:
    repo = hub.repo(request, found["type"], found["repo"], files=True)
    commit, blob = repo.file(found["rev"], found["rest"])
    headers = {"X-Repo-Commit": commit.sha, "ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes"}
    if blob.lfs:
        headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(blob.size)}
        return Reply(status=302, headers=headers | {"Location": f"{hub.storage}/storage/{blob.sha256}"})
    return content(hub, request, blob.sha256, headers)


@route("GET HEAD", "/storage/<sha256>")
def storage(hub: "LoopbackHub", request: Request, found: dict[str, str]) -> Reply:
    if "authorization" in request.headers:
        raise HubError(400, None, "Only one auth mechanism allowed")  # as the storage host does: the link is signed
    return content(hub, request, found["sha256"], {"ETag": f'"{found["sha256"]}"', "Accept-Ranges": "bytes"})


def content(hub: "LoopbackHub", request: Request, sha256: str, headers: dict[str, str]) -> Reply:
    """The bytes of a blob, or the part that a `Range: bytes=a-b | a- | -n` header asks for."""
    data = hub.blobs.path(sha256).read_bytes()
    asked = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("range", ""))
    if asked is None or asked.groups() == ("", ""):
        return Reply(data, headers=headers)
    first, last = asked.groups()
    start = int(first) if first else max(0, len(data) - int(last))
    end = min(int(last) + 1, len(data)) if first and last else len(data)
    if start >= end:
        raise HubError(416, None, "Range not satisfiable", Content_Range=f"bytes */{len(data)}")
    return Reply(data[start:end], 206, headers | {"Content-Range": f"bytes {start}-{end - 1}/{len(data)}"})


# Writing. The client asks which files go where (preupload), sends LFS contents to the storage host, then commits.


@route("POST", "/api/repos/create")
def create_repo(hub: "LoopbackHub", request: Request, found: dict[str, str]) -> Reply:
    asked = request.json()
    caller = hub.caller(request)
    if caller is None:
        raise HubError(401, None, "Invalid username or password.")
    type, owner = asked.get("type") or "model", asked.get("organization") or caller.user
    if not caller.may_write(owner):
        raise HubError(403, None, f'You don\'t have the rights to create a {type} under the namespace "{owner}"')
    repo_id = f"{owner}/{asked['name']}"
    if not REPO_NAME.fullmatch(asked["name"]) or repo_id in hub.refused_names:
        raise HubError(400, None, f'Repository name "{asked["name"]}" is not allowed')
    prefix = "" if type == "model" else f"{type}s/"
    reply = {"url": f"{hub.endpoint}/{prefix}{repo_id}", "name": repo_id, "id": repo_id}
    if (type, repo_id) in hub.repos:
        return Reply(reply | {"error": f"You already created this {type} repo"}, 409)
    repo = hub.repos[type, repo_id] = Repo(repo_id, type, private=asked.get("visibility") == "private")
    repo.commit({".gitattributes": hub.blobs.blob(".gitattributes", b"")}, title="initial commit")
    return Reply(reply)


@route("DELETE", "/api/repos/delete")
def delete_repo(hub: "LoopbackHub", request: Request, found: dict[str, str]) -> Reply:
    asked = request.json()
    caller = hub.caller(request)
    owner = asked.get("organization") or (caller.user if caller else hub.user)
    type, repo_id = asked.get("type") or "model", f"{owner}/{asked['name']}"
    hub.repo(request, type, repo_id, write=True)
    del hub.repos[type, repo_id]
    return Reply()


@route("POST", "/api/validate-yaml")
def validate_yaml(hub: "LoopbackHub", request: Request, found: dict[str, str]) -> Reply:
    asked = request.json()
    errors, warnings = card_errors(asked["content"], asked.get("repoType") or "model")
    reply = {"errors": [{"message": text} for text in errors], "warnings": [{"message": text} for text in warnings]}
    return Reply(reply, 400 if errors else 200)


@route("POST", "/api/<api_repo>/preupload/<rev>")
def preupload(hub: "LoopbackHub", request: Request, found: dict[str, str]) -> Reply:
    repo = hub.repo(request, found["type"], found["repo"], write=True)
    present = repo.at(found["rev"]).files if repo.ref_name(found["rev"]) else {}
    answers = []
    for file in request.json()["files"]:
        mode = "lfs" if goes_to_lfs(file["path"], file["size"]) else "regular"
        reply = {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
        if file["path"] in present:
            reply["oid"] = present[file["path"]].etag  # equal to the local one: the client leaves the file out
        answers.append(reply)
    return Reply({"files": answers})


@route("POST", r"/<repo>\.git/info/lfs/objects/batch")
def lfs_batch(hub: "LoopbackHub", request: Request, found: dict[str, str]) -> Reply:
    repo = hub.repo(request, found["type"], found["repo"], write=True)
    objects = []
    signed = f"?repo={quote(repo.type + ':' + repo.id)}&X-Amz-Signature=signed"  # as storage addresses are signed
    for file in request.json()["objects"]:
        oid, size = file["oid"], file["size"]
        reply: dict[str, Any] = {"oid": oid, "size": size}
        if oid not in repo.lfs:
            upload: dict[str, Any] = {"href": f"{hub.storage}/storage/{oid}{signed}", "header": {}}
            if hub.multipart_chunk and size > hub.multipart_chunk:
                n_parts = -(-size // hub.multipart_chunk)
                upload["header"] = {"chunk_size": str(hub.multipart_chunk)}
                upload["header"] |= {
                    f"{i:05d}": f"{hub.storage}/storage/{oid}/part/{i}{signed}" for i in range(1, n_parts + 1)
                }
            verify = f"{hub.endpoint}/api/verify"
            reply["actions"] = {"upload": upload, "verify": {"href": verify, "header": {}}}
        objects.append(reply)
    return Reply({"transfer": "multipart" if hub.multipart_chunk else "basic", "objects": objects})


@route("PUT", "/storage/<sha256>(?:/part/<part>)?")
def store(hub: "LoopbackHub", request: Request, found: dict[str, str]) -> Reply:
    if "part" in found:
        hub.parts.setdefault(found["sha256"], {})[int(found["part"])] = request.body
    else:
        put_checked(hub, request, found["sha256"], request.body)
    return Reply(headers={"ETag": f'"{hashlib.md5(request.body).hexdigest()}"'})


@route("POST", "/storage/<sha256>")
def finish_parts(hub: "LoopbackHub", request: Request, found: dict[str, str]) -> Reply:
    parts = hub.parts.get(found["sha256"], {})
    numbers = [part["partNumber"] for part in request.json()["parts"]]
    if missing := set(numbers) - parts.keys():
        raise HubError(400, None, f"parts {sorted(missing)} were not uploaded")
    put_checked(hub, request, found["sha256"], b"".join(parts[number] for number in numbers))
    return Reply({})


def put_checked(hub: "LoopbackHub", request: Request, sha256: str, data: bytes) -> None:
    if hashlib.sha256(data).hexdigest() != sha256:
        raise HubError(400, None, "the uploaded bytes do not have the announced sha256")
    hub.blobs.put(data)
    type, _, repo_id = request.query.get("repo", "").partition(":")
    if (type, repo_id) not in hub.repos:
        raise HubError(403, None, "the signature of this address does not match")
    hub.repos[type, repo_id].lfs.add(sha256)


@route("POST", "/api/verify")
def verify(hub: "LoopbackHub", request: Request, found: dict[str, str]) -> Reply:
    asked = request.json()
    path = hub.blobs.path(asked["oid"])
    if not path.exists() or path.stat().st_size != asked["size"]:
        raise HubError(404, None, f"object {asked['oid']} was not uploaded")
    return Reply({})


@route("POST", "/api/<api_repo>/commit/<rev>")
def commit(hub: "LoopbackHub", request: Request, found: dict[str, str]) -> Reply:
    """All lines of the body become one commit, or nothing does."""
    repo = hub.repo(request, found["type"], found["repo"], write=True)
    header: dict[str, Any] = {}
    changes: dict[str, Blob] = {}
    deleted = []
    for line in request.body.splitlines():
        key, value = (item := json.loads(line))["key"], item["value"]
        if key == "header":
            header = value
        elif key == "file":
            changes[value["path"]] = hub.blobs.blob(value["path"], base64.b64decode(value["content"]))
        elif key == "lfsFile":
            path = hub.blobs.path(value["oid"])
            if value["oid"] not in repo.lfs:
                raise HubError(400, None, f"LFS object {value['oid']} of {value['path']} was not uploaded")
            size = path.stat().st_size
            changes[value["path"]] = Blob(value["oid"], git_sha1(pointer(value["oid"], size)), size, True)
        elif key in ("deletedFile", "deletedFolder"):
            deleted.append(value["path"].rstrip("/") + ("/" if key == "deletedFolder" else ""))
        else:
            raise HubError(400, None, f"unknown operation {key}")
    if repo.ref_name(found["rev"]) is None:
        raise HubError(404, "RevisionNotFound", f"Invalid rev id: {found['rev']}")
    branch, reply = found["rev"], {}
    if "create_pr" in request.query:
        number = 1 + sum(ref.startswith("refs/pr/") for ref in repo.refs)
        branch = f"refs/pr/{number}"
        repo.refs[branch] = repo.at(found["rev"]).sha
        reply = {"pullRequestUrl": f"{hub.endpoint}/{repo.id}/discussions/{number}"}
    title, parent = header.get("summary", ""), header.get("parentCommit")
    made = repo.commit(changes, deleted=deleted, branch=branch, title=title, parent_sha=parent)
    return Reply(
        reply | {"success": True, "commitOid": made.sha, "commitUrl": f"{hub.endpoint}/{repo.id}/commit/{made.sha}"}
    )


@route("POST", "/api/<api_repo>/(?P<what>tag|branch)/<rev>")
def create_ref(hub: "LoopbackHub", request: Request, found: dict[str, str]) -> Reply:
    """A tag names itself in the body and its target in the path; a branch the other way round."""
    repo, asked = hub.repo(request, found["type"], found["repo"], write=True), request.json()
    if found["what"] == "tag":
        name, target = f"refs/tags/{asked['tag']}", found["rev"]
    else:
        name, target = f"refs/heads/{found['rev']}", asked.get("startingPoint", "main")
    if name in repo.refs:
        raise HubError(409, None, f"{name} exists already")
    repo.refs[name] = repo.at(target).sha
    return Reply({})


@route("DELETE", "/api/<api_repo>/(?P<what>tag|branch)/<rev>")
def delete_ref(hub: "LoopbackHub", request: Request, found: dict[str, str]) -> Reply:
    repo = hub.repo(request, found["type"], found["repo"], write=True)
    name = f"refs/{'tags' if found['what'] == 'tag' else 'heads'}/{found['rev']}"
    if repo.refs.pop(name, None) is None:
        raise HubError(404, "RevisionNotFound", f"no {name}")
    return Reply({})
