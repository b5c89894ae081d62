"""A bundle into a repository of the Hub: the one commit, and the check of what arrived.

What can go wrong before the commit leaves the repository as it was; one that was made for the bundle is removed again
unless parts of the upload are there already, which the next attempt then does not send again.
"""

import contextlib
import hashlib
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from mechint.errors import MechintError, one_line
from mechint.hub.bundle import METADATA, Bundle, Staged, check_names, read_metadata, staged
from mechint.hub.preview import Row, dry_run, format_size, plan
from mechint.huggingface.client import (
    check_may_write,
    clean_client_log,
    download,
    hub_api,
    hub_errors,
    hub_url,
    is_broken_connection,
    patiently,
    status_of,
    tree,
)
from mechint.provenance import sha256_file

__all__ = ["Published", "Row", "dry_run", "format_size", "plan", "publish"]

# Times that the commit is made anew because somebody else's came between.
_HEADS = 3


class Published(NamedTuple):
    url: str  # of the repository
    commit: str  # the commit that holds the bundle: the new one, or the head that held it already
    changed: bool  # False: the same content was there, nothing was committed


@dataclass
class _Upload:
    """One publish on its way: the repository it goes to, and what was made for it and may have to go again."""

    api: Any
    repo_id: str
    repo_type: str
    revision: str
    token: str | None
    endpoint: str | None
    made_repo: bool = False
    made_branch: bool = False
    operations: dict[str, Any] = field(default_factory=dict)  # of the files, so that none is hashed or sent twice

    @property
    def where(self) -> dict[str, str]:
        return {"repo_type": self.repo_type, "revision": self.revision}


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
    progress: bool = True,
) -> Published:
    """Upload a bundle in one commit, then check what arrived.

    Files that an earlier publish put there and that this bundle has no more are removed in the same commit; files of
    other origin stay. The same content once more makes no commit. Large files that arrived in an attempt that was
    interrupted are not sent again.

    Args:
        create_repo: make the repository (and the branch `revision`) where there is none.
        private: make the repository as a private one. An existing one stays what it is; if that is public, it is
            an error.
        commit_message: "Upload <kind> bundle: <name>" if not given.
        token: instead of HF_TOKEN or the saved one; it is not kept.
        progress: show what is staged and sent, on standard error.

    Raises:
        MechintError: nothing was published, and the repository is as before; or the bundle is there but could not be
            checked, which the message says.
    """
    check_names(bundle.files)
    check_may_write(repo_id, token=token, endpoint=endpoint)
    with staged(bundle, repo_id, progress=progress) as ready:
        assert ready.folder is not None
        if bundle.check is not None:
            bundle.check(ready.folder)
        upload = _Upload(hub_api(token, endpoint), repo_id, repo_type, revision, token, endpoint)
        message = commit_message or f"Upload {bundle.kind} bundle: {bundle.name}"
        with clean_client_log(), _client_bars(progress):
            head = _open(upload, create_repo=create_repo, private=private)
            with _undo(upload):
                commit, changed = _commit(upload, ready, head, message)
            if changed:
                _check_arrived(bundle, ready, upload, commit)
    return Published(hub_url(repo_id, repo_type, endpoint), commit, changed)


@contextlib.contextmanager
def _client_bars(progress: bool) -> Iterator[None]:
    """The client's bars of the bytes sent, off where no progress is wanted."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if progress or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _open(upload: _Upload, *, create_repo: bool, private: bool) -> str:
    """The head of the branch that is published to; repository and branch are made if they may and must be."""
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    with hub_errors("publishing to", upload.repo_id, upload.token):
        try:
            info = patiently("reading the repository", lambda: upload.api.repo_info(upload.repo_id, **upload.where))
            if private and not info.private:
                raise MechintError(
                    f"{upload.repo_id} exists and is public: make it private in its settings on the Hub, or leave"
                    " --private out; nothing was published"
                )
            return str(info.sha)
        except RevisionNotFoundError:
            if not create_repo:
                raise
        except RepositoryNotFoundError:
            if not create_repo:
                raise MechintError(
                    f"{upload.repo_id} is not on the Hub: leave --no-create-repo out to make it"
                ) from None
            _make_repo(upload, private)
        with _undo(upload):
            if upload.revision != "main":
                _make_branch(upload)
            return _head(upload)


def _make_repo(upload: _Upload, private: bool) -> None:
    with hub_errors("making the repository", upload.repo_id, upload.token):
        patiently(
            "making the repository",
            # exist_ok: an attempt whose answer was lost did make it
            lambda: upload.api.create_repo(upload.repo_id, private=private, repo_type=upload.repo_type, exist_ok=True),
        )
    upload.made_repo = True


def _make_branch(upload: _Upload) -> None:
    patiently(
        f"making the branch {upload.revision}",
        lambda: upload.api.create_branch(
            upload.repo_id, branch=upload.revision, repo_type=upload.repo_type, exist_ok=True
        ),
    )
    upload.made_branch = True


def _head(upload: _Upload) -> str:
    info = patiently("reading the repository", lambda: upload.api.repo_info(upload.repo_id, **upload.where))
    return str(info.sha)


def _commit(upload: _Upload, ready: Staged, head: str, message: str) -> tuple[str, bool]:
    """Make the one commit on top of `head`. Returns the commit that holds the bundle, and whether it is new."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    api, repo_id = upload.api, upload.repo_id
    assert ready.folder is not None
    for attempt in range(_HEADS):
        with hub_errors("reading", repo_id, upload.token):
            present = patiently("reading", lambda head=head: tree(api, repo_id, head, upload.repo_type))
        changed = [name for name in ready.files if not _same(present.get(name), ready, name)]
        gone = _left_over(upload, present, head, ready)
        if not changed and not gone:
            # On the second round: our own commit arrived, only the answer was lost.
            return head, attempt > 0
        operations: list[Any] = [CommitOperationDelete(name) for name in gone]
        for name in changed:
            add = upload.operations.get(name)
            if add is None:
                add = upload.operations[name] = CommitOperationAdd(name, str(ready.folder / name))
            add._remote_oid = None  # of another head: what is unchanged has been left out above
            operations.append(add)
        try:
            with hub_errors("uploading to", repo_id, upload.token):
                made = patiently(
                    f"uploading to {repo_id}",
                    lambda operations=operations, head=head: api.create_commit(
                        repo_id, operations, commit_message=message, parent_commit=head, **upload.where
                    ),
                )
            return str(made.oid), True
        except MechintError as error:
            if status_of(error) != 412 or attempt + 1 == _HEADS:
                raise
        # The head moved. Go on on top of the new one, unless what came between touches the same files.
        with hub_errors("reading", repo_id, upload.token):
            moved = _head(upload)
            now = patiently("reading", lambda moved=moved: tree(api, repo_id, moved, upload.repo_type))
        _check_not_ours(ready, present, now, repo_id)
        head = moved
    raise AssertionError("the last attempt returns or raises")


def _check_not_ours(ready: Staged, before: Mapping[str, Any], now: Mapping[str, Any], repo_id: str) -> None:
    touched = [
        name
        for name in ready.files
        if _oid(before.get(name)) != _oid(now.get(name)) and not _same(now.get(name), ready, name)
    ]
    if touched:
        raise MechintError(
            f"{repo_id}: somebody else's commit changed {', '.join(touched[:3])} while this was uploaded; nothing was"
            " published: look at it, then run the same command again to replace it"
        )


def _left_over(upload: _Upload, present: Mapping[str, Any], head: str, ready: Staged) -> list[str]:
    """Files at `head` that an earlier publish listed as its own and that are no part of this one."""
    if METADATA not in present:
        return []
    with hub_errors(f"reading {METADATA} of", upload.repo_id, upload.token), tempfile.TemporaryDirectory() as cache:
        path = download(
            upload.repo_id,
            METADATA,
            revision=head,
            repo_type=upload.repo_type,
            cache_dir=Path(cache),
            token=upload.token,
            endpoint=upload.endpoint,
        )
        try:
            listed = read_metadata(path.read_bytes()).get("files")
        except MechintError:  # somebody else's file of that name: then nothing is ours to remove
            return []
    named = listed if isinstance(listed, dict) else {}
    return sorted(name for name in named if name in present and name not in ready.files)


def _oid(entry: Any) -> str | None:
    return None if entry is None else (entry.lfs.sha256 if entry.lfs else entry.blob_id)


def _same(entry: Any, ready: Staged, name: str) -> bool:
    """Whether a file of the repository has the content of the staged one."""
    file = ready.files[name]
    if entry is None or entry.size != file.size:
        return False
    if entry.lfs:
        return entry.lfs.sha256 == file.sha256
    assert ready.folder is not None
    digest = hashlib.sha1(b"blob %d\0" % file.size)  # git's name for the content
    with open(ready.folder / name, "rb") as opened:
        while piece := opened.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest() == entry.blob_id


@contextlib.contextmanager
def _undo(upload: _Upload) -> Iterator[None]:
    """Remove the repository or branch that was made for this publish if the block fails.

    Not when the connection broke or the user stopped it after large files had been sent: what arrived would be lost,
    and the next attempt would begin again.
    """
    try:
        yield
    except BaseException as error:
        sent = any(getattr(add, "_upload_mode", None) == "lfs" for add in upload.operations.values())
        status = status_of(error)
        stopped = (
            not isinstance(error, Exception) or is_broken_connection(error) or status == 429 or (status or 0) >= 500
        )
        if upload.made_repo and sent and stopped:
            print(
                f"{upload.repo_id} was made and holds no files yet; what arrived of the upload is kept for the next"
                f" attempt. Run the same command again, or remove it: hf repo delete {upload.repo_id}",
                file=sys.stderr,
            )
        elif upload.made_repo:
            _quietly(lambda: _delete_if_empty(upload), f"{upload.repo_id}, which was made for this publish,")
        elif upload.made_branch:
            _quietly(
                lambda: upload.api.delete_branch(upload.repo_id, branch=upload.revision, repo_type=upload.repo_type),
                f"the branch {upload.revision} of {upload.repo_id}, which was made for this publish,",
            )
        raise


def _delete_if_empty(upload: _Upload) -> None:
    """Delete the repository that was made here, if nobody has put anything into it meanwhile."""
    api, repo_id = upload.api, upload.repo_id
    present = tree(api, repo_id, "main", upload.repo_type)
    if set(present) <= {".gitattributes"}:
        api.delete_repo(repo_id, repo_type=upload.repo_type, missing_ok=True)


def _quietly(call: Any, what: str) -> None:
    """Clean up after a failure; a second failure must not hide the first."""
    try:
        call()
    except Exception:
        print(
            f"{what} could not be removed again: remove it on the Hub, or run the same command again", file=sys.stderr
        )


def _check_arrived(bundle: Bundle, ready: Staged, upload: _Upload, commit: str) -> None:
    """All files must be in the new commit; some come back into a fresh cache and must hash and compute the same."""
    names = bundle.check_files or (min(bundle.files or ready.files, key=lambda name: ready.files[name].size),)
    repo_id, repo_type, token = upload.repo_id, upload.repo_type, upload.token
    with tempfile.TemporaryDirectory(prefix="mechint-check-") as cache:
        try:
            with hub_errors("reading", repo_id, token):
                present = patiently("checking", lambda: tree(upload.api, repo_id, commit, repo_type))
            if lost := [name for name in ready.files if not _same(present.get(name), ready, name)]:
                raise MechintError(f"{', '.join(lost[:3])} did not get into it (a .gitignore in the repository?)")
            folder = Path(cache)
            for name in names:
                where: dict[str, Any] = {"repo_type": repo_type, "token": token, "endpoint": upload.endpoint}
                path = download(repo_id, name, revision=commit, cache_dir=Path(cache), **where)
                folder = path.parents[name.count("/")]
                if sha256_file(path) != ready.files[name].sha256:
                    raise MechintError(f"{name} comes back with other bytes than were sent")
            if bundle.check is not None:
                bundle.check(folder)
        except MechintError as error:
            raise MechintError(
                f"{repo_id}: published as commit {commit[:12]}, but the check of what arrived failed:"
                f" {one_line(error, 200)}"
            ) from None
