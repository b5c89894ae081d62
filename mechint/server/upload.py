"""An upload to the Hub: the SAE in the community standard (SAELens's layout), with a certificate, in one commit.

Only the files of this SAE's folder in the repository are written; what else lies there stays. A job that is done again
finds the same bytes there and makes no second commit.
"""

import io
import os
from pathlib import Path
from typing import Any

from mechint.errors import MechintError, one_line
from mechint.server import storage
from mechint.server.download import hub_token
from mechint.server.errors import ServiceError, from_hub, repository_not_found
from mechint.server.ingest import without_path
from mechint.server.jobs import OUR_MISTAKES, Running, Stop, end
from mechint.server.storage import relative_name, sae_folder

CONVERTED = 50.0
COMMITTING = 99.0


def run_upload(running: Running) -> None:
    """The job `upload`."""
    running.report("convert", 0.0, "Converting to the community standard", always=True)
    token = hub_token(running)
    if token is False:
        raise ServiceError("forbidden", "An upload needs a token", "provide access_token", status=403)
    storage.check_room(running.settings, storage.size_of(sae_folder(running.settings, running.sae_id)) // 3, "the copy")
    staged = storage.stage(running.settings, running.id, running.attempt, take_over=False)
    folder = exported(running, staged / "saelens")
    url, commit = push(running, folder, token)
    with running.held() as (session, job, _):
        result = {"sae_id": running.sae_id, "repo_id": running.params["repo_id"]}
        result |= {"filepath": running.params["filepath"], "url": url, "commit_hash": commit}
        end(session, job, "done", stage="complete", progress=100.0, message="Uploaded", result=result)


def exported(running: Running, output: Path) -> Path:
    """The SAE as SAELens lays it out, converted from the files as they came."""
    from mechint.formats.convert import find_format, load, write_proved
    from mechint.server.ingest import only_file

    original = sae_folder(running.settings, running.sae_id) / "original"
    with running.db.read() as session:
        from mechint.server.models import SharedSAE

        row = session.get(SharedSAE, running.sae_id)
    if row is None or row.status == "deleted" or not original.is_dir():
        raise ServiceError("files_missing", f"The files of {running.sae_id} are gone", "import it again", status=409)
    try:
        form, sae = load(only_file(original) or original)
        # what the library knows and the files do not say
        said = {"model_name": row.model_name, "hook_name": row.hook_name}
        sae.metadata.update({k: v for k, v in said.items() if v and not sae.metadata.get(k)})
        running.check()
        write_proved(sae, output, find_format("saelens", to=True), extra={"source": {"format": form.name}})
    except MechintError as error:
        words = without_path(without_path(str(error), original), output.parent)
        raise ServiceError("conversion_failed", f"Conversion failed: {words}", status=422) from None
    return output


def push(running: Running, folder: Path, token: str | bool) -> tuple[str, str]:
    """Commit a folder to `filepath` of the repository: `(address there, commit)`.

    Raises:
        ServiceError: the Hub's failures; a repository that is not there, and not to be made.
    """
    from mechint.huggingface.client import hub_api
    from mechint.saelens.upload import operations_for

    asked = running.params
    repo_id, path = asked["repo_id"], relative_name(asked["filepath"])
    files = sorted(entry for entry in folder.iterdir() if entry.is_file())
    total = sum(file.stat().st_size for file in files)
    sent = Sent(running, total)
    api = hub_api(token)
    operations: list[Any] = []
    running.report("upload", CONVERTED, "Uploading: 50.0%", bytes_done=0, bytes_total=total, always=True)
    try:
        if asked.get("create_repo"):
            api.create_repo(repo_id, private=bool(asked.get("private")), exist_ok=True)
        elif not api.repo_exists(repo_id):
            raise ServiceError(
                "repository_not_found",
                f"Repository not found: {repo_id}",
                "check repo_id, provide access_token, or set create_repo",
                status=404,
            )
        running.check()
        operations += operations_for(
            api,
            repo_id,
            {path: folder},
            names=[file.name for file in files],
            opened=lambda file: Counted(file, sent) if is_large(file) else file.read_bytes(),
        )
        sent.reset()  # the hashes are read too; from here on every byte read is a byte sent
        done = api.create_commit(repo_id, operations, commit_message=asked.get("commit_message") or "Upload SAE")
    except (Stop, ServiceError, *OUR_MISTAKES):
        raise
    except Exception as error:  # the HTTP library's classes differ between versions of huggingface_hub
        running.check()  # a stop that the client library wrapped comes out again
        cause = error
        while cause.__cause__ is not None and getattr(cause, "response", None) is None:
            cause = cause.__cause__  # it names the file, we want the Hub's answer
        failed = from_hub(cause, repo_id, what="uploading to")
        if failed.code == "repository_not_found":
            raise repository_not_found(repo_id) from None
        raise failed from None
    finally:
        for operation in operations:
            if isinstance(operation.path_or_fileobj, Counted):
                operation.path_or_fileobj.close()
    running.report("upload", COMMITTING, "Uploading: 99.0%", bytes_done=total, bytes_total=total, always=True)
    address = f"{api.endpoint}/{repo_id}/tree/main/{'' if path == '.' else path}".rstrip("/")
    return one_line(address, 1500), str(done.oid)


def is_large(file: Path) -> bool:
    return file.stat().st_size > 1 << 16


class Sent:
    """Bytes that the client has read of all files together, told to those who watch."""

    def __init__(self, running: Running, total: int):
        self.running, self.total, self.places = running, max(total, 1), {}
        self.counts = False

    def reset(self) -> None:
        self.counts = True

    def at(self, file: Path, place: int) -> None:
        """Raises `Stop` when the work must end: between two chunks."""
        self.running.check()
        if not self.counts:
            return
        self.places[file] = place
        done = min(sum(self.places.values()), self.total)
        progress = CONVERTED + (COMMITTING - CONVERTED) * done / self.total
        text = f"Uploading: {progress:.1f}%"
        self.running.report("upload", progress, text, bytes_done=done, bytes_total=self.total)


class Counted(io.BufferedReader):
    """A file whose reader is told how far it is, chunk by chunk."""

    def __init__(self, path: Path, sent: Sent):
        super().__init__(io.FileIO(path, "rb"))
        self._path, self._sent = path, sent

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or size < 0:
            size = os.fstat(self.fileno()).st_size - self.tell()
        data = super().read(size)
        self._sent.at(self._path, self.tell())
        return data
