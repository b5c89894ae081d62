"""Progress for those who watch: the jobs that changed are read from the database, and told to every subscriber.

One task a server process asks the database, a few times a second and only while somebody watches; so several servers
and workers need nothing between them but the database. A subscriber that is slow loses states in between, never the
last one: what waits for it is one event a channel.
"""

import asyncio
import contextlib
import logging
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from sqlalchemy import func, select
from starlette.concurrency import run_in_threadpool

from mechint.server.db import Database
from mechint.server.jobs import DOWNLOADS, status_of
from mechint.server.models import Job, Revision, SharedSAE

POLL_SECONDS = 0.15
# After a failure (a database that restarts) it asks again, less and less often.
MAX_PAUSE_SECONDS = 5.0
_CHANNEL = re.compile(r"sae/(sae_[0-9a-f]{12})/(download|upload)")
UPLOADS = ("upload", "publish")

log = logging.getLogger(__name__)


class Channel(NamedTuple):
    """`sae/<id>/download` or `sae/<id>/upload`. Imports tell their progress on the former."""

    sae_id: str
    what: str

    @property
    def name(self) -> str:
        return f"sae/{self.sae_id}/{self.what}"

    @property
    def event(self) -> str:
        return f"sae:{self.what}"


def parse_channel(text: Any) -> Channel | None:
    found = _CHANNEL.fullmatch(text) if isinstance(text, str) else None
    return Channel(found[1], found[2]) if found else None


def channel_of(job: Job) -> Channel:
    return Channel(job.sae_id, "download" if job.kind in DOWNLOADS else "upload")


def message_of_job(job: Job) -> dict[str, Any]:
    """The event that tells the state of a job."""
    channel = channel_of(job)
    status = status_of(job)
    stage = "complete" if job.state == "done" else job.stage
    data: dict[str, Any] = {
        "sae_id": job.sae_id,
        "progress": 100.0 if job.state == "done" else round(job.progress, 1),
        "status": status,
        "message": (job.error or job.message) if status == "error" else job.message,
        "stage": stage,
        "job_id": job.id,
        "bytes_done": job.bytes_done,
        "bytes_total": job.bytes_total,
    }
    if (job.result or {}).get("url"):
        data["repo_url"] = job.result["url"]  # type: ignore[index]
    return {"event": channel.event, "channel": channel.name, "data": data}


def message_of_sae(sae: SharedSAE, channel: Channel) -> dict[str, Any]:
    """The event for an SAE that has no job of that kind (any more)."""
    progress = 100.0 if sae.status == "ready" else round(sae.progress, 1)
    data = {
        "sae_id": sae.id,
        "progress": progress,
        "status": sae.status,
        "message": sae.error_message or {"ready": "Ready", "deleted": "Deleted"}.get(sae.status, sae.status),
        "stage": "complete" if sae.status == "ready" else "queued",
    }
    return {"event": channel.event, "channel": channel.name, "data": data}


class Subscriber:
    """What one connection waits for: its channels, and for each at most one event that it has not taken yet."""

    def __init__(self) -> None:
        self.channels: set[Channel] = set()
        self._waiting: dict[Channel, dict[str, Any]] = {}
        self._ready = asyncio.Event()
        self._free = asyncio.Event()
        self._free.set()

    def hold(self) -> None:
        """Keep events back until `release`: the answer to a request goes out first."""
        self._free.clear()

    def release(self) -> None:
        self._free.set()

    def waits(self, channel: Channel) -> bool:
        return channel in self._waiting

    def put(self, channel: Channel, message: dict[str, Any]) -> None:
        if channel in self.channels:
            self._waiting[channel] = message
            self._ready.set()

    def forget(self, channel: Channel) -> None:
        self._waiting.pop(channel, None)

    async def take(self) -> list[dict[str, Any]]:
        """The events that wait, once there is one."""
        await self._ready.wait()
        await self._free.wait()
        self._ready.clear()
        found = list(self._waiting.values())
        self._waiting.clear()
        return found


class Events:
    """The watchers of one server process, and the task that asks the database for them."""

    def __init__(self, db: Database):
        self.db = db
        self._subscribers: dict[Channel, set[Subscriber]] = {}
        self._seen = 0  # the last change that was read
        self._task: asyncio.Task[None] | None = None
        self._starting = asyncio.Lock()

    @property
    def watching(self) -> int:
        """Channels that somebody watches."""
        return len(self._subscribers)

    async def subscribe(self, subscriber: Subscriber, channel: Channel) -> bool:
        """Whether there is such an SAE. Its present state is the first event."""
        subscriber.channels.add(channel)
        self._subscribers.setdefault(channel, set()).add(subscriber)
        # what changes from here on comes by itself; so the present state may be told twice, but none is missed
        await self._start()
        message = await run_in_threadpool(self._present, channel)
        if message is None:
            self.unsubscribe(subscriber, channel)
            return False
        if not subscriber.waits(channel):  # else it has a newer one already
            subscriber.put(channel, message)
        return True

    def unsubscribe(self, subscriber: Subscriber, channel: Channel) -> None:
        subscriber.channels.discard(channel)
        subscriber.forget(channel)
        others = self._subscribers.get(channel)
        if others is not None:
            others.discard(subscriber)
            if not others:
                del self._subscribers[channel]

    def leave(self, subscriber: Subscriber) -> None:
        for channel in list(subscriber.channels):
            self.unsubscribe(subscriber, channel)

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None

    async def _start(self) -> None:
        async with self._starting:
            if self._task is None or self._task.done():
                self._seen = await run_in_threadpool(self._last)
                self._task = asyncio.create_task(self._watch(), name="mechint events")

    def _last(self) -> int:
        with self.db.read() as session:
            return session.scalar(select(func.max(Revision.value))) or 0

    async def _watch(self) -> None:
        """Runs while there are subscribers; the next one starts it again."""
        pause = POLL_SECONDS
        while self._subscribers:
            try:
                self._tell(await run_in_threadpool(self._changed, {channel.sae_id for channel in self._subscribers}))
                pause = POLL_SECONDS
            except Exception:  # whatever the database's driver raises: those who watch go on watching
                log.exception("the jobs' progress cannot be read")
                pause = min(2 * pause, MAX_PAUSE_SECONDS)
            await asyncio.sleep(pause)

    def _tell(self, messages: Iterable[tuple[Channel, dict[str, Any]]]) -> None:
        for channel, message in messages:
            for subscriber in self._subscribers.get(channel, ()):
                subscriber.put(channel, message)

    def _changed(self, sae_ids: set[str]) -> list[tuple[Channel, dict[str, Any]]]:
        """Events of the jobs that changed since the last call. Changes are numbered in the order of their commits."""
        with self.db.read() as session:
            last = session.scalar(select(func.max(Revision.value))) or 0
            if last <= self._seen:
                return []
            jobs = session.scalars(select(Job).where(Job.seq > self._seen).order_by(Job.seq))
            found = [(channel_of(job), message_of_job(job)) for job in jobs if job.sae_id in sae_ids]
        self._seen = last  # not before all of it was read
        return found

    def _present(self, channel: Channel) -> dict[str, Any] | None:
        with self.db.read() as session:
            sae = session.get(SharedSAE, channel.sae_id)
            if sae is None:
                return None
            kinds = DOWNLOADS if channel.what == "download" else UPLOADS
            asked = select(Job).where(Job.sae_id == channel.sae_id, Job.kind.in_(kinds)).order_by(Job.seq.desc())
            job = session.scalars(asked.limit(1)).first()
            return message_of_job(job) if job is not None else message_of_sae(sae, channel)
