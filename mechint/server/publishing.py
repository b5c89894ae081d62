"""Publishing an SAE of the library as a bundle: its card, its metadata, its weights and their hashes (`mechint.hub`).

An upload puts an SAE's two files into a folder of a repository; a bundle is a repository of its own that says where the
SAE is from and how good it is, as `mechint publish-sae` writes it.
"""

import re
import shutil
from pathlib import Path

from mechint.errors import MechintError, one_line
from mechint.server import library, storage
from mechint.server.download import hub_token
from mechint.server.errors import ServiceError, forbidden, from_hub, not_ready
from mechint.server.ingest import without_path
from mechint.server.jobs import Running, end
from mechint.server.models import Job, SharedSAE

CHECKED = 30.0


def create_publish(
    service: library.Service,
    *,
    sae_id: str,
    repo_id: str,
    access_token: str | None = None,
    create_repo: bool = False,
    private: bool = False,
    commit_message: str | None = None,
    license: str | None = None,
) -> Job:
    """A queued publication. 404; 409 `not_ready`; 403 without any token to use."""
    repo_id = library.check_repo(repo_id)
    if not access_token and not service.settings.uses_server_token:
        raise forbidden("Publishing needs a token", "provide access_token")
    with service.db.read() as session:
        sae = library.get_sae(session, sae_id)
        if sae.status != "ready":
            raise not_ready(sae_id, sae.status)
    params = {
        "repo_id": repo_id,
        "create_repo": create_repo,
        "private": private,
        "commit_message": commit_message,
        "license": license,
    }
    return library.add(service, sae, "publish", params, access_token)


def run_publish(running: Running) -> None:
    """The job `publish`."""
    from mechint.hub.license import SAE_LICENSE
    from mechint.hub.publish import publish
    from mechint.hub.sae_bundle import sae_bundle

    asked = running.params
    running.report("convert", 0.0, "Making the bundle", always=True)
    token = hub_token(running)
    if token is False:
        raise forbidden("Publishing needs a token", "provide access_token")
    source = named_copy(running)
    try:
        bundle = sae_bundle(source, license=asked.get("license") or SAE_LICENSE)
    except MechintError as error:
        told = without_path(str(error), source.parent)
        raise ServiceError("not_publishable", f"No bundle can be made of it: {told}", status=422) from None
    running.report("upload", CHECKED, "Publishing", always=True)
    running.check()  # from here on it is one commit, or none
    try:
        done = publish(
            bundle,
            asked["repo_id"],
            create_repo=bool(asked.get("create_repo")),
            private=bool(asked.get("private")),
            commit_message=asked.get("commit_message"),
            token=token if isinstance(token, str) else None,
            progress=False,
        )
    except MechintError as error:
        raise explained(error, asked["repo_id"], source) from None
    with running.held() as (session, job, _):
        result = {"sae_id": running.sae_id, "repo_id": asked["repo_id"], "filepath": "."}
        result |= {"url": one_line(done.url, 1500), "commit_hash": done.commit}
        message = "Published" if done.changed else "Published already: the same content is there"
        end(session, job, "done", stage="complete", progress=100.0, message=message, result=result)


def named_copy(running: Running) -> Path:
    """The SAE's files as they came, in a folder of the run's or the SAE's name: the bundle is called after it."""
    with running.db.read() as session:
        row = session.get(SharedSAE, running.sae_id)
    original = storage.sae_folder(running.settings, running.sae_id) / "original"
    if row is None or row.status == "deleted" or not original.is_dir():
        raise ServiceError("files_missing", f"The files of {running.sae_id} are gone", "import it again", status=409)
    said = (row.sae_metadata or {}).get("run") or row.training_id or row.name
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", str(said))[:80].strip("-.") or running.sae_id
    storage.check_room(running.settings, storage.size_of(original), "the bundle")
    staged = storage.stage(running.settings, running.id, running.attempt, take_over=False) / name
    shutil.copytree(original, staged, symlinks=True)
    return staged


def explained(error: MechintError, repo_id: str, source: Path) -> ServiceError:
    """The Hub's own failures under their names; else what the publisher told."""
    cause = error.__cause__ or error.__context__
    if cause is not None and (getattr(cause, "response", None) is not None or "hub" in type(cause).__module__):
        return from_hub(cause, repo_id, what="publishing to")
    return ServiceError("not_published", without_path(one_line(error, 500), source.parent), status=409)
