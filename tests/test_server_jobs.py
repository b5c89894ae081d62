"""Jobs as rows: who may take them, what survives, what ends. No worker process: `execute` with work of the tests."""

import dataclasses
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("celery")
pytest.importorskip("sqlalchemy")

from serving import settings_for  # noqa: E402

from mechint.errors import MechintError  # noqa: E402
from mechint.server import jobs, library, tasks, tokens  # noqa: E402
from mechint.server.errors import ServiceError, hub_failed, rate_limited  # noqa: E402
from mechint.server.jobs import Running, claim, reap, release  # noqa: E402
from mechint.server.library import Service  # noqa: E402
from mechint.server.models import Job, Revision, SharedSAE  # noqa: E402


class Mail:
    """Instead of a broker: what was sent. `broken` raises, as a broker does that is away."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, str]] = []
        self.broken = False

    def __call__(self, kind: str, job_id: str) -> None:
        if self.broken:
            raise ConnectionError("no broker")
        self.sent.append((kind, job_id))


@pytest.fixture
def mail() -> Mail:
    return Mail()


@pytest.fixture
def service(tmp_path: Path, mail: Mail) -> Service:
    from mechint.server.db import open_database

    settings = settings_for(tmp_path, lease_seconds=30.0, max_attempts=3)
    return Service(settings, open_database(settings), mail)


def add(service: Service, **more: Any) -> tuple[SharedSAE, Job]:
    return library.create_download(service, repo_id="user/repo", filepath="layer_1", **more)


def row(service: Service, job: Job) -> Job:
    with service.db.read() as session:
        return library.get_job(session, job.id)


def sae_of(service: Service, job: Job) -> SharedSAE:
    with service.db.read() as session:
        found = session.get(SharedSAE, job.sae_id)
        assert found is not None
        return found


def take(service: Service, job: Job) -> Running:
    found = claim(service.settings, service.db, job.id)
    assert found is not None
    return found


def change(service: Service, job: Job, **values: Any) -> None:
    with service.db.write() as session:
        found = session.get(Job, job.id)
        for name, value in values.items():
            setattr(found, name, value)


def does(monkeypatch: pytest.MonkeyPatch, work: Callable[[Running], None]) -> None:
    monkeypatch.setattr(tasks, "work_of", lambda kind: work)


def test_a_new_job_is_there_and_a_message_is_sent(service: Service, mail: Mail):
    sae, job = add(service, access_token="hf_secret")
    assert mail.sent == [("download", job.id)]
    stored = row(service, job)
    assert (stored.state, stored.stage, stored.attempts, sae.status) == ("queued", "queued", 0, "pending")
    assert stored.woken_at > 0 and "hf_secret" not in str(stored.params) + str(stored.token_cipher)
    assert take(service, job).token == "hf_secret"


def test_of_many_that_want_it_one_gets_it(service: Service):
    _, job = add(service)
    found: list[Running | None] = []
    start = threading.Barrier(8)

    def want() -> None:
        start.wait()
        found.append(claim(service.settings, service.db, job.id))

    threads = [threading.Thread(target=want) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and sum(one is not None for one in found) == 1
    assert row(service, job).attempts == 1


def test_a_doubled_message_does_nothing(service: Service, monkeypatch: pytest.MonkeyPatch):
    _, job = add(service)
    done: list[str] = []
    does(monkeypatch, lambda running: finish(running, done))
    assert tasks.execute(service.settings, service.db, job.id) == "done"
    assert tasks.execute(service.settings, service.db, job.id) == "not claimed"
    assert tasks.execute(service.settings, service.db, "job_000000000000") == "not claimed"
    assert done == [job.id]


def finish(running: Running, done: list[str]) -> None:
    done.append(running.id)
    with running.held() as (session, job, _):
        jobs.end(session, job, "done")


def test_a_worker_that_lost_its_lease_changes_nothing(service: Service):
    _, job = add(service)
    late = take(service, job)
    change(service, job, lease_until=time.time() - 1)
    now = take(service, job)
    assert now.attempt == 2
    for act in (
        lambda: late.report("download", 50.0, "late", always=True),
        lambda: jobs.Running.check(late),
    ):
        with pytest.raises(jobs.LeaseLost):
            act()
    release(late)
    assert tasks.ended(late, ServiceError("failed", "late")) == "lost"
    stored = row(service, job)
    assert (stored.state, stored.attempts, stored.message) == ("running", 2, "Starting")
    now.report("download", 10.0, "mine", always=True)
    assert row(service, job).message == "mine"


def test_the_lease_is_kept_while_work_goes_on(service: Service, monkeypatch: pytest.MonkeyPatch):
    short = dataclasses.replace(service.settings, lease_seconds=0.4)
    _, job = add(service)
    running = claim(short, service.db, job.id)
    assert running is not None
    with running.alive():
        time.sleep(1.2)
        assert (row(service, job).lease_until or 0) > time.time()
        monkeypatch.setattr(jobs, "is_gone", lambda worker: False)
        assert claim(short, service.db, job.id) is None


def test_reaping_puts_back_what_a_dead_worker_held(service: Service, mail: Mail):
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    _, job = add(service)
    take(service, job)
    mail.sent.clear()
    assert reap(service.settings, service.db, mail) == 0, "we live"
    change(service, job, worker_id=f"{jobs._place()}:{gone.stdout.strip()}")
    assert reap(service.settings, service.db, mail) == 1
    stored = row(service, job)
    assert (stored.state, stored.lease_until) == ("queued", None) and mail.sent == [("download", job.id)]
    assert sae_of(service, job).status == "pending"


def test_a_worker_of_another_machine_is_gone_when_its_lease_is(service: Service, mail: Mail):
    _, job = add(service)
    take(service, job)
    change(service, job, worker_id="elsewhere/1:1")
    assert reap(service.settings, service.db, mail) == 0
    change(service, job, lease_until=time.time() - 0.1)
    assert reap(service.settings, service.db, mail) == 1


def test_a_job_that_kills_its_workers_ends_in_error_with_the_reason(service: Service, mail: Mail):
    _, job = add(service, access_token="hf_secret")
    for _ in range(service.settings.max_attempts):
        take(service, job).report("convert", 90.0, "Converting", always=True)
        change(service, job, lease_until=0.0)
        reap(service.settings, service.db, mail)
    stored = row(service, job)
    assert (stored.state, stored.error_code, stored.token_cipher) == ("error", "worker_lost", None)
    assert "Given up after 3 attempts" in (stored.error or "") and "Converting" in (stored.error or "")
    assert sae_of(service, job).status == "error"


def test_a_broker_that_is_away_loses_nothing(service: Service, mail: Mail):
    mail.broken = True
    _, job = add(service)
    assert row(service, job).state == "queued" and mail.sent == []
    mail.broken = False
    reap(service.settings, service.db, mail)
    assert mail.sent == [("download", job.id)]
    reap(service.settings, service.db, mail)
    assert len(mail.sent) == 1, "it was just woken"
    change(service, job, woken_at=time.time() - jobs.WAKE_SECONDS - 1)
    reap(service.settings, service.db, mail)
    assert len(mail.sent) == 2, "that message was lost"
    reap(service.settings, service.db, mail, restarted=True)
    assert len(mail.sent) == 3


def test_a_failure_that_may_pass_waits_and_counts(service: Service, monkeypatch: pytest.MonkeyPatch, mail: Mail):
    _, job = add(service)

    def work(running: Running) -> None:
        raise rate_limited(40)

    does(monkeypatch, work)
    assert tasks.execute(service.settings, service.db, job.id) == "queued"
    stored = row(service, job)
    assert stored.not_before == pytest.approx(time.time() + 40, abs=5) and "next try in 40 s" in stored.message
    mail.sent.clear()
    reap(service.settings, service.db, mail)
    assert mail.sent == [] and claim(service.settings, service.db, job.id) is None, "not before its time"
    for _ in range(2):
        change(service, job, not_before=0.0)
        tasks.execute(service.settings, service.db, job.id)
    stored = row(service, job)
    assert (stored.state, stored.error_code, stored.attempts) == ("error", "rate_limited", 3)
    assert "Rate limit exceeded" in (sae_of(service, job).error_message or "")


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (
            ServiceError("config_not_found", "Config file not found: x", "check SAE format"),
            "config_not_found",
            "Config",
        ),
        (MechintError("a broken file"), "failed", "a broken file"),
        (OSError(28, "No space left on device"), "disk_full", "No room left"),
        (MemoryError(), "memory_full", "Not enough memory"),
        (KeyError("hf_secret"), "internal", "Internal error: KeyError"),
    ],
)
def test_other_failures_end_it_with_their_reason(
    service: Service, monkeypatch: pytest.MonkeyPatch, error: Exception, code: str, words: str
):
    _, job = add(service, access_token="hf_secret")

    def work(running: Running) -> None:
        raise error

    does(monkeypatch, work)
    assert tasks.execute(service.settings, service.db, job.id) == "error"
    stored, sae = row(service, job), sae_of(service, job)
    assert stored.error_code == code and words in (stored.error or "") and "hf_secret" not in (stored.error or "")
    assert (sae.status, sae.error_message, stored.token_cipher) == ("error", stored.error, None)
    assert (stored.worker_id, stored.lease_until) == (None, None) and stored.finished_at is not None


def test_cancel_a_waiting_job_at_once_and_a_running_one_at_its_next_report(
    service: Service, monkeypatch: pytest.MonkeyPatch
):
    sae, job = add(service, access_token="hf_secret")
    library.cancel(service, job_id=job.id)
    stored = row(service, job)
    assert (stored.state, stored.token_cipher) == ("cancelled", None)
    assert tasks.execute(service.settings, service.db, job.id) == "not claimed"
    assert (sae_of(service, job).status, sae_of(service, job).error_message) == ("error", "Cancelled")
    with pytest.raises(ServiceError, match="Nothing to cancel"):
        library.cancel(service, job_id=job.id)
    _, job = add(service)

    def work(running: Running) -> None:
        running.report("download", 1.0, "one", always=True)
        library.cancel(service, job_id=running.id)
        running.report("download", 2.0, "two", always=True)
        raise AssertionError("it went on")

    does(monkeypatch, work)
    assert tasks.execute(service.settings, service.db, job.id) == "cancelled"


def test_cancel_of_a_job_whose_worker_is_gone(service: Service, mail: Mail):
    _, job = add(service)
    take(service, job)
    library.cancel(service, job_id=job.id)
    change(service, job, lease_until=0.0)
    reap(service.settings, service.db, mail)
    assert row(service, job).state == "cancelled"


def test_a_worker_that_is_to_end_gives_its_job_back_uncounted(service: Service, monkeypatch: pytest.MonkeyPatch):
    _, job = add(service, access_token="hf_secret")
    stop = threading.Event()

    def work(running: Running) -> None:
        running.report("download", 40.0, "forty", always=True)
        stop.set()
        running.check()

    does(monkeypatch, work)
    assert tasks.execute(service.settings, service.db, job.id, stop=stop) == "queued"
    stored = row(service, job)
    assert (stored.state, stored.attempts, stored.worker_id, stored.woken_at) == ("queued", 0, None, 0.0)
    assert stored.progress == 40.0 and stored.token_cipher is not None
    assert take(service, job).previous_worker is None


def test_changes_are_numbered_in_the_order_of_their_commits(service: Service):
    """Whoever has seen number n never finds a smaller one later."""
    made = [add(service)[1] for _ in range(4)]
    seen: list[int] = []
    done = threading.Event()

    def watch() -> None:
        last = 0
        while not done.is_set() or last < top():
            with service.db.read() as session:
                new = [job.seq for job in library.list_jobs(session) if job.seq > last]
            last = max([last, *new])
            seen.extend(sorted(new))

    def top() -> int:
        with service.db.read() as session:
            found = session.get(Revision, 1)
            assert found is not None
            return found.value

    def work(job: Job) -> None:
        running = take(service, job)
        for i in range(12):
            running.report("download", float(i), str(i), always=True)

    watcher = threading.Thread(target=watch)
    watcher.start()
    threads = [threading.Thread(target=work, args=(job,)) for job in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    watcher.join()
    assert seen == sorted(set(seen)) and top() == 4 + 4 + 4 * 12
    assert {job.seq for job in map(lambda job: row(service, job), made)} <= set(seen)


def test_progress_never_goes_back_over_attempts(service: Service):
    _, job = add(service)
    first = take(service, job)
    first.report("download", 60.0, "sixty", always=True)
    release(first)
    take(service, job).report("download", 5.0, "again", always=True)
    assert row(service, job).progress == 60.0


def test_tokens_of_jobs_that_wait_too_long_are_blanked(service: Service, mail: Mail):
    _, job = add(service, access_token="hf_secret")
    change(service, job, token_until=time.time() - 1)
    reap(service.settings, service.db, mail)
    assert row(service, job).token_cipher is None
    from mechint.server.download import hub_token

    assert service.settings.uses_server_token
    with pytest.raises(ServiceError, match="not kept any more"):
        hub_token(take(service, job))  # and the server's own does not stand in for it


def test_statuses_of_events(service: Service):
    _, job = add(service)
    states = [
        ("queued", "queued", "pending"), ("running", "queued", "pending"), ("running", "download", "downloading"),
        ("running", "convert", "converting"), ("running", "upload", "uploading"), ("done", "complete", "ready"),
        ("error", "download", "error"), ("cancelled", "download", "error"),
    ]  # fmt: skip
    for state, stage, status in states:
        job.state, job.stage = state, stage
        assert jobs.status_of(job) == status


@pytest.mark.parametrize(
    ("repo_id", "filepath"), [("nouser", "a"), ("a/b/c", "a"), ("../x/y", "a"), ("a/b", "../../x"), ("a/b", "/abs")]
)
def test_requests_that_lead_out_make_no_job(service: Service, mail: Mail, repo_id: str, filepath: str):
    with pytest.raises(ServiceError) as error:
        library.create_download(service, repo_id=repo_id, filepath=filepath)
    assert error.value.status == 400 and mail.sent == []


def test_lists_filter_search_sort_and_page(service: Service):
    for number, (name, model) in enumerate(
        [("alpha", "gpt2"), ("beta_1", "gpt2"), ("betax1", "pythia"), ("100%", None)]
    ):
        sae, job = library.create_download(
            service, repo_id=f"user/r{number}", filepath="a", name=name, model_name=model
        )
    library.delete_sae(service, sae.id)
    with service.db.read() as session:

        def names(**asked: Any) -> list[str]:
            return [sae.name for sae in library.list_saes(session, **asked).items]

        assert names() == ["betax1", "beta_1", "alpha"]
        assert names(sort_by="name", order="asc") == ["alpha", "beta_1", "betax1"]
        assert names(search="beta_1") == ["beta_1"], "_ is no wildcard"
        assert names(search="%") == [] and names(search="USER/R0") == ["alpha"]
        assert names(model_name="pythia") == ["betax1"] and names(status="ready") == []
        page = library.list_saes(session, skip=1, limit=1)
        assert (page.total, [sae.name for sae in page.items]) == (3, ["beta_1"])
        for wrong in ({"sort_by": "sae_metadata"}, {"status": "deleted"}, {"order": "up"}, {"source": "x"}):
            with pytest.raises(ServiceError, match="unknown"):
                library.list_saes(session, **wrong)


def test_retry_begins_anew_and_only_after_an_error(service: Service, monkeypatch: pytest.MonkeyPatch):
    sae, job = add(service)
    with pytest.raises(ServiceError, match="Nothing to retry"):
        library.retry(service, sae.id)
    does(monkeypatch, lambda running: (_ for _ in ()).throw(ServiceError("x", "y")))
    tasks.execute(service.settings, service.db, job.id)
    again = library.retry(service, sae.id, access_token="hf_new")
    assert again.params == job.params | {"with_token": True} and again.id != job.id
    assert tokens.reveal(service.settings, again.token_cipher) == "hf_new"
    assert sae_of(service, again).status == "pending"


def test_one_failed_try_at_the_hub_is_not_the_end(service: Service, monkeypatch: pytest.MonkeyPatch):
    _, job = add(service)
    answers = [hub_failed("the Hub answered 503"), None]

    def work(running: Running) -> None:
        if (error := answers.pop(0)) is not None:
            raise error
        finish(running, [])

    does(monkeypatch, work)
    assert tasks.execute(service.settings, service.db, job.id) == "queued"
    change(service, job, not_before=0.0)
    assert tasks.execute(service.settings, service.db, job.id) == "done"


def test_a_late_worker_leaves_the_files_of_the_one_that_took_over(service: Service, monkeypatch: pytest.MonkeyPatch):
    from mechint.server.storage import stage

    _, job = add(service)
    theirs: list[Path] = []

    def work(running: Running) -> None:
        change(service, job, lease_until=time.time() - 1)
        take(service, job)
        theirs.append(stage(service.settings, job.id, 2, take_over=False))
        raise ServiceError("failed", "my folder is gone")

    does(monkeypatch, work)
    assert tasks.execute(service.settings, service.db, job.id) == "lost"
    assert theirs[0].is_dir() and row(service, job).state == "running"


@pytest.mark.parametrize("what", ["database", "terminal"])
def test_what_fails_for_a_moment_ends_nothing(service: Service, monkeypatch: pytest.MonkeyPatch, what: str):
    from sqlalchemy.exc import OperationalError

    _, job = add(service)

    def work(running: Running) -> None:
        if what == "terminal":  # where Celery says that it ends, in its handler of the signal
            raise BrokenPipeError
        raise OperationalError("SELECT", {}, Exception("database is locked"))

    does(monkeypatch, work)
    assert tasks.execute(service.settings, service.db, job.id) == "queued"
    assert row(service, job).state == "queued"
