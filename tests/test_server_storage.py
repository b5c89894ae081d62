"""Files of the service: paths that lead out, links, what a crash leaves, secrets on disk, the embedded broker."""

import dataclasses
import os
import stat
from pathlib import Path, PurePosixPath

import pytest

pytest.importorskip("celery")
pytest.importorskip("sqlalchemy")

from serving import settings_for  # noqa: E402

from mechint.errors import MechintError  # noqa: E402
from mechint.server import storage, tokens  # noqa: E402
from mechint.server.db import Database, open_database  # noqa: E402
from mechint.server.errors import ServiceError  # noqa: E402
from mechint.server.models import Job, SharedSAE  # noqa: E402
from mechint.server.settings import Settings, settings_from  # noqa: E402

IDS = [f"sae_{i:012x}" for i in range(9)]
JOBS = [f"job_{i:012x}" for i in range(9)]


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return settings_for(tmp_path)


@pytest.fixture
def db(settings: Settings) -> Database:
    return open_database(settings)


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", "..", "a/../b", "a/..", "../x", "a//b", "a/./b", "~/x", "C:/x", "a\\b", "a\nb", "a\0b", ".git/x"],
)
def test_paths_that_lead_out_are_refused(path: str):
    with pytest.raises(ServiceError, match="leads out"):
        storage.relative_name(path)


@pytest.mark.parametrize(
    ("path", "plain"),
    [("layer_6", "layer_6"), ("layer_6/", "layer_6"), ("", "."), (".", "."), ("./a/b.npz", "a/b.npz"), (" a ", "a")],
)
def test_plain_paths_stay(path: str, plain: str):
    assert storage.relative_name(path) == plain


@pytest.mark.parametrize("name", ["..", "sae_0", "../sae_000000000000", "sae_000000000000/..", "job_00000000000g", ""])
def test_only_ids_name_folders(settings: Settings, name: str):
    with pytest.raises(ServiceError, match="not an id"):
        storage.sae_folder(settings, name)


def test_inside_takes_what_lies_in_an_allowed_folder_only(tmp_path: Path):
    allowed, other = tmp_path / "allowed", tmp_path / "allowed_not"
    for folder in (allowed / "sae", other):
        folder.mkdir(parents=True)
        (folder / "cfg.json").write_text("{}")
    (allowed / "out").symlink_to(other)
    (allowed / "in").symlink_to(allowed / "sae")
    assert storage.inside(str(allowed / "sae"), [allowed]) == (allowed, PurePosixPath("sae"))
    assert storage.inside(str(allowed / "in" / "cfg.json"), [allowed]) == (allowed, PurePosixPath("sae/cfg.json"))
    refused = [other, allowed / "out", allowed / "out" / "cfg.json", allowed / ".." / "allowed_not", allowed / "none"]
    for path in [*map(str, refused), "/etc/passwd", "", "a\0b", "sae", os.path.relpath(allowed / "sae")]:
        with pytest.raises(ServiceError, match="File not found"):
            storage.inside(path, [allowed])
    with pytest.raises(ServiceError, match="File not found"):
        storage.inside(str(allowed / "sae"), [])


def test_copy_in_leaves_links_and_pipes_out(tmp_path: Path):
    source = tmp_path / "root" / "sae"
    (source / "below").mkdir(parents=True)
    (source / "a.json").write_text("one")
    (source / "below" / "b.json").write_text("three")
    (source / "link").symlink_to("/etc/passwd")
    (source / "folder_link").symlink_to("/etc")
    os.mkfifo(source / "pipe")
    done = storage.copy_in(tmp_path / "root", PurePosixPath("sae"), tmp_path / "to", limit=100)
    assert done == 8
    assert sorted(p.relative_to(tmp_path / "to").as_posix() for p in (tmp_path / "to").rglob("*")) == [
        "a.json", "below", "below/b.json"
    ]  # fmt: skip
    one = storage.copy_in(tmp_path / "root", PurePosixPath("sae/a.json"), tmp_path / "file", limit=3)
    assert one == 3 and (tmp_path / "file" / "a.json").read_text() == "one"
    with pytest.raises(ServiceError, match="larger than"):
        storage.copy_in(tmp_path / "root", PurePosixPath("sae"), tmp_path / "again", limit=7)


def test_copy_in_follows_no_link_that_is_put_there_after_the_check(tmp_path: Path):
    """What was a folder when the path was checked is a link when it is read."""
    secret, root = tmp_path / "secret", tmp_path / "root"
    (secret / "sae").mkdir(parents=True)
    (secret / "sae" / "key").write_text("secret")
    (root / "mine" / "sae").mkdir(parents=True)
    checked = storage.inside(str(root / "mine" / "sae"), [root])
    os.rename(root / "mine", root / "gone")
    (root / "mine").symlink_to(secret)
    with pytest.raises(ServiceError, match="File not found"):
        storage.copy_in(*checked, tmp_path / "to", limit=1000)
    assert not list((tmp_path / "to").rglob("*"))


def test_stage_takes_over_downloads_and_nothing_else(settings: Settings):
    first = storage.stage(settings, JOBS[0], 1, take_over=True)
    (first / "repo").mkdir()
    (first / "repo" / "half.part").write_text("bytes")
    (first / "original").mkdir()
    second = storage.stage(settings, JOBS[0], 2, take_over=True)
    assert [p.name for p in second.rglob("*")] == ["repo", "half.part"] and not first.exists()
    third = storage.stage(settings, JOBS[0], 3, take_over=False)
    assert list(third.iterdir()) == [] and not second.exists()


def test_publish_replaces_what_a_crash_left(settings: Settings):
    for text in ("left by a crash", "whole"):
        staged = storage.stage(settings, JOBS[0], 1, take_over=False) / "new"
        staged.mkdir()
        (staged / "file").write_text(text)
        storage.publish(settings, staged, IDS[0])
    assert (settings.saes_dir / IDS[0] / "file").read_text() == "whole"
    assert list(settings.trash_dir.iterdir()) == []


def test_sweep_removes_orphans_and_keeps_what_is_in_use(settings: Settings, db: Database):
    rows = [
        (IDS[0], "ready", "saes/x", True),
        (IDS[1], "error", None, False),  # a crash after the rename, before the commit; then the job was given up
        (IDS[2], "downloading", None, True),  # the same, with a job that goes on
        (IDS[3], "deleted", None, False),
        (IDS[4], "deleted", "saes/x", True),  # its files were to stay
    ]
    with db.write() as session:
        for sae_id, status, path, _ in rows:
            session.add(SharedSAE(id=sae_id, name="x", source="local", status=status, local_path=path, sae_metadata={}))
        session.flush()
        session.add(Job(id=JOBS[2], kind="download", sae_id=IDS[2], state="running", params={}))
        session.add(Job(id=JOBS[1], kind="download", sae_id=IDS[1], state="error", params={}))
    for sae_id, *_ in rows:
        (settings.saes_dir / sae_id).mkdir(parents=True)
    (settings.saes_dir / IDS[5]).mkdir()  # of no row
    (settings.saes_dir / "stray.txt").write_text("x")
    for job_id in (JOBS[1], JOBS[2], JOBS[7]):
        storage.stage(settings, job_id, 1, take_over=False)
    (settings.trash_dir / "old" / "deep").mkdir(parents=True)
    removed = {path.name for path in storage.sweep(settings, db)}
    assert removed == {IDS[1], IDS[3], IDS[5], "stray.txt", JOBS[1], JOBS[7], "old"}
    assert {p.name for p in settings.saes_dir.iterdir()} == {sae_id for sae_id, *_, stays in rows if stays}
    assert {p.name for p in settings.staging_dir.iterdir()} == {JOBS[2]}
    assert list(settings.trash_dir.iterdir()) == []
    assert storage.sweep(settings, db) == []


def test_room_is_checked_before_work(settings: Settings, monkeypatch: pytest.MonkeyPatch):
    storage.check_room(settings, 1000, "it")
    with pytest.raises(ServiceError, match="allowed are") as error:
        storage.check_room(settings, settings.max_sae_bytes + 1, "it")
    assert error.value.status == 413
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 10**6, 10**6))  # type: ignore[attr-defined]
    with pytest.raises(ServiceError, match="No room for it") as error:
        storage.check_room(settings, 1000, "it")
    assert error.value.status == 507


# --- secrets ----------------------------------------------------------------------------------------------------------


def test_tokens_are_encrypted_with_a_key_that_only_its_owner_can_read(settings: Settings):
    cipher, until = tokens.hide(settings, "hf_secret")
    assert cipher is not None and until is not None and "hf_secret" not in cipher
    key = settings.data_dir / tokens.KEY_FILE
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert tokens.reveal(settings, cipher) == "hf_secret"
    key.unlink()
    assert tokens.reveal(settings, cipher) is None, "another key"
    assert tokens.hide(settings, None) == (None, None) and tokens.reveal(settings, None) is None


def test_tokens_too_old_are_not_used(settings: Settings, monkeypatch: pytest.MonkeyPatch):
    cipher, _ = tokens.hide(settings, "hf_secret")
    import time

    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + tokens.TOKEN_SECONDS + 5)
    assert tokens.reveal(settings, cipher) is None


def test_a_key_that_is_none_is_an_error(tmp_path: Path):
    with pytest.raises(MechintError, match="MECHINT_SECRET_KEY should be 32 bytes"):
        tokens.hide(Settings(data_dir=tmp_path, secret_key="short"), "hf_x")


# --- settings and the database ----------------------------------------------------------------------------------------


def test_settings_reach_a_worker_unchanged(tmp_path: Path):
    given = Settings(
        data_dir=tmp_path, database_url="postgresql://u:p@h/d", broker_url="redis://h/1", host="0.0.0.0", port=9,
        api_key="k", import_roots=(tmp_path / "a", tmp_path / "b"), runs_root=tmp_path / "r", max_upload_bytes=5,
        max_sae_bytes=6, secret_key="s", share_hub_token=False, lease_seconds=7.5, max_attempts=2,
        allowed_hosts=("x.example", "y.example"),
    )  # fmt: skip
    assert settings_from(given.environment()) == given
    assert settings_from({}) == Settings()
    assert "k" not in repr(given).replace("broker", "").split("api_key")[0][-1:] and "api_key" not in repr(given)
    with pytest.raises(MechintError, match="MECHINT_PORT should be a number"):
        settings_from({"MECHINT_PORT": "http"})


def test_the_servers_own_token_is_shared_on_loopback_only(tmp_path: Path):
    assert Settings(data_dir=tmp_path).uses_server_token
    assert not Settings(data_dir=tmp_path, host="0.0.0.0", api_key="k").uses_server_token
    assert Settings(data_dir=tmp_path, host="0.0.0.0", api_key="k", share_hub_token=True).uses_server_token


def test_migrations_make_the_tables_that_the_models_say(settings: Settings, db: Database):
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    from mechint.server.models import Base

    with db.engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []
    open_database(settings)  # again: nothing to do


def test_a_database_of_a_newer_version_is_left_alone(settings: Settings, db: Database):
    from sqlalchemy import text

    with db.write() as session:
        session.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(MechintError, match="update mechint"):
        open_database(settings)


@pytest.mark.parametrize(
    ("url", "words"), [("mysql://x/y", "not supported"), ("nonsense", "cannot be used"), ("sqlite://", "in memory")]
)
def test_databases_that_cannot_be_used(tmp_path: Path, url: str, words: str):
    with pytest.raises(MechintError, match=words):
        open_database(Settings(data_dir=tmp_path, database_url=url))


# --- the embedded broker ----------------------------------------------------------------------------------------------


def test_messages_are_taken_once_in_order_and_rubbish_is_skipped(settings: Settings):
    from queue import Empty

    from mechint.server.broker import Channel, clean, make_app

    settings = dataclasses.replace(settings, broker_url="")
    app = make_app(settings)
    queue = settings.broker_dir / "queue"
    for job_id in JOBS[:3]:
        app.send_task("sae.download", args=[job_id], queue="sae", ignore_result=True)
    (queue / "0-half.sae.msg").write_text('{"body": ')
    (queue / ".1-hidden.sae.msg").write_text("a writer was killed")
    with app.connection_for_read() as connection:
        channel = connection.channel()
        assert isinstance(channel, Channel)
        found = [str(channel._get("sae")["headers"]["argsrepr"]) for _ in range(3)]
        assert [text[2:-2] for text in found] == JOBS[:3] or [text[2:-3] for text in found] == JOBS[:3]
        with pytest.raises(Empty):
            channel._get("sae")
    assert [entry.name for entry in queue.iterdir()] == [".1-hidden.sae.msg"]
    clean(queue)
    assert len(list(queue.iterdir())) == 1, "it may still be written"
    clean(queue, seconds=-1.0)
    assert list(queue.iterdir()) == []
