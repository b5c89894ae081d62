"""Progress over the WebSocket of a real server: late clients, many clients, unknown channels, attempts to emit."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra `server` is not installed")

import websockets
from live_server import SAES, Server
from loopback_hub import LoopbackHub
from test_server_api import TOKEN, USER, saelens_folder

REPO = "lab/saes"
SECONDS = 60


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoopbackHub]:
    folder = tmp_path_factory.mktemp("hub")
    saelens_folder(folder / "repo" / "layer_6", d_sae=2000)
    with LoopbackHub(folder, user=USER, token=TOKEN) as found:
        found.add_repo(REPO, folder / "repo")
        yield found


@pytest.fixture(scope="module")
def server(hub: LoopbackHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Without a worker at first: a job waits until a test starts one."""
    folder = tmp_path_factory.mktemp("server")
    with Server(folder, env=hub.env(folder / "hf")) as found:
        yield found


def connect(server: Server, **arguments: Any) -> Any:
    return websockets.connect(f"ws://127.0.0.1:{server.port}/ws", proxy=None, **arguments)


async def say(socket: Any, **message: Any) -> None:
    await socket.send(json.dumps(message))


async def hear(socket: Any) -> dict[str, Any]:
    return json.loads(await asyncio.wait_for(socket.recv(), SECONDS))


async def silent(socket: Any, seconds: float = 0.6) -> bool:
    """Whether nothing comes for several polls."""
    try:
        await asyncio.wait_for(socket.recv(), seconds)
    except TimeoutError:
        return True
    return False


def queued(server: Server) -> str:
    reply = server.post(f"{SAES}/download", {"repo_id": REPO, "filepath": "layer_6"})
    assert reply.status == 202, reply.text
    return reply.json()["id"]


def test_a_download_from_beginning_to_end(server: Server):
    """The present state first, then every stage in order, up to the end; then the client that comes late."""

    async def watch() -> list[dict[str, Any]]:
        sae_id = queued(server)
        channel = f"sae/{sae_id}/download"
        async with connect(server) as socket:
            await say(socket, action="subscribe", channel=channel)
            assert await hear(socket) == {"event": "subscribed", "channel": channel}
            events = [await hear(socket)]
            server.start_worker()
            while events[-1]["data"]["status"] not in ("ready", "error"):
                events.append(await hear(socket))
        assert all(event["event"] == "sae:download" and event["channel"] == channel for event in events)
        data = [event["data"] for event in events]
        assert all({"sae_id", "progress", "status", "message", "stage"} <= one.keys() for one in data)
        assert all(one["sae_id"] == sae_id for one in data)
        assert data[0]["status"] == "pending" and data[0]["progress"] == 0
        assert data[-1] | {"progress": 100, "status": "ready", "stage": "complete"} == data[-1]
        order = ["pending", "downloading", "converting", "ready"]
        seen = [order.index(one["status"]) for one in data]
        assert seen == sorted(seen)
        progress = [one["progress"] for one in data]
        assert progress == sorted(progress)
        async with connect(server) as late:
            await say(late, action="subscribe", channel=channel)
            assert (await hear(late))["event"] == "subscribed"
            assert (await hear(late))["data"] == data[-1]
        return data

    asyncio.run(watch())


def test_a_hundred_clients_see_the_end(server: Server):
    n_clients = 100

    async def one(sae_id: str, joined: asyncio.Semaphore) -> dict[str, Any]:
        async with connect(server, open_timeout=SECONDS) as socket:
            await say(socket, action="subscribe", channel=f"sae/{sae_id}/download")
            assert (await hear(socket))["event"] == "subscribed"
            joined.release()
            while True:
                data = (await hear(socket))["data"]
                if data["status"] in ("ready", "error"):
                    return data

    async def all_of_them() -> None:
        joined = asyncio.Semaphore(0)
        sae_id = queued(server)
        clients = [asyncio.create_task(one(sae_id, joined)) for _ in range(n_clients)]
        for _ in range(n_clients):
            await asyncio.wait_for(joined.acquire(), SECONDS)
        server.start_worker()
        ends = await asyncio.gather(*clients)
        assert len(ends) == n_clients and all(end == ends[0] for end in ends) and ends[0]["status"] == "ready"

    asyncio.run(all_of_them())


def test_an_upload_ends_with_the_address(server: Server, hub: LoopbackHub):
    async def watch() -> None:
        server.start_worker()
        sae_id = queued(server)
        server.wait_sae(sae_id)
        async with connect(server) as socket:
            await say(socket, action="subscribe", channel=f"sae/{sae_id}/upload")
            assert (await hear(socket))["event"] == "subscribed"
            present = (await hear(socket))["data"]
            assert present["status"] == "ready", "nothing is being uploaded"
            asked = {"sae_id": sae_id, "repo_id": f"{USER}/up", "filepath": "layer_6", "create_repo": True}
            assert server.post(f"{SAES}/upload", asked | {"access_token": TOKEN}).status == 202
            data = [(await hear(socket))["data"]]
            while data[-1]["status"] not in ("ready", "error"):
                data.append((await hear(socket))["data"])
        assert {one["status"] for one in data} <= {"pending", "converting", "uploading", "ready"}, data
        assert data[-1]["stage"] == "complete" and hub.endpoint in data[-1]["repo_url"], data[-1]

    asyncio.run(watch())


def test_unknown_channels_and_attempts_to_emit(server: Server):
    sae_id = queued(server)
    channel = f"sae/{sae_id}/upload"  # on which the server itself has nothing to tell

    async def attempts() -> None:
        async with connect(server) as watcher, connect(server) as socket:
            await say(watcher, action="subscribe", channel=channel)
            first = [await hear(watcher), await hear(watcher)]
            assert first[0]["event"] == "subscribed"
            for message in (
                {"action": "emit", "channel": channel, "event": "sae:upload", "data": {"status": "ready"}},
                {"event": "sae:upload", "channel": channel, "data": {"sae_id": sae_id, "status": "ready"}},
                {"action": "publish", "channel": channel, "data": {}},
                {"action": "subscribe", "channel": "sae/*/download"},
                {"action": "subscribe", "channel": "sae/../download"},
                {"action": "subscribe", "channel": f"sae/{sae_id}/extraction"},
                {"action": "subscribe", "channel": ["sae", sae_id]},
                {"action": "subscribe"},
                {"action": ["subscribe"], "channel": channel},
                {"action": "subscribe", "channel": "sae/sae_000000000000/download"},
            ):
                await say(socket, **message)
                answer = await hear(socket)
                assert answer["event"] == "error" and answer["message"], (message, answer)
            for text in ("nonsense", "[]", "[" * 3000, "null", '"x"'):
                await socket.send(text)
                assert (await hear(socket))["event"] == "error", text
            assert "not found" in answer["message"]
            assert await silent(watcher), "nothing of it reached another client"
            # and the connection still works
            await say(socket, action="subscribe", channel=channel)
            assert (await hear(socket))["event"] == "subscribed" and (await hear(socket))["data"]["sae_id"] == sae_id

    asyncio.run(attempts())


def test_unsubscribed_is_silent_and_cancel_is_told(server: Server, hub: LoopbackHub):
    async def watch() -> None:
        sae_id = queued(server)
        channel = f"sae/{sae_id}/download"
        async with connect(server) as leaving, connect(server) as staying:
            for socket in (leaving, staying):
                await say(socket, action="subscribe", channel=channel)
                assert (await hear(socket))["event"] == "subscribed"
            await say(leaving, action="unsubscribe", channel=channel)
            while (await hear(leaving))["event"] != "unsubscribed":
                pass
            server.post(f"{SAES}/{sae_id}/cancel")
            data = (await hear(staying))["data"]
            while data["status"] not in ("error", "ready"):
                data = (await hear(staying))["data"]
            assert data["status"] in ("error", "ready")  # a worker of another test may have been faster
            assert await silent(leaving)

    asyncio.run(watch())


@pytest.mark.parametrize("what", ["x" * 5000, b"\x00\x01", "x" * 100_000], ids=["long", "binary", "huge"])
def test_what_is_too_long_or_no_text_ends_the_connection(server: Server, what: str | bytes):
    async def attempt() -> int:
        async with connect(server) as socket:
            await socket.send(what)
            with pytest.raises(websockets.ConnectionClosed) as closed:
                await asyncio.wait_for(socket.recv(), SECONDS)
            assert closed.value.rcvd is not None
            return closed.value.rcvd.code

    assert asyncio.run(attempt()) in (1003, 1009)
    assert server.is_alive()


def test_pages_of_other_sites_cannot_listen(server: Server):
    async def attempt(origin: str | None, **headers: str) -> int:
        try:
            async with connect(server, origin=origin, additional_headers=headers) as socket:
                await say(socket, action="unsubscribe", channel="sae/sae_000000000000/download")
                assert (await hear(socket))["event"] == "unsubscribed"
                return 101
        except websockets.InvalidStatus as refused:
            return refused.response.status_code

    own = f"http://127.0.0.1:{server.port}"
    assert asyncio.run(attempt(None)) == 101
    assert asyncio.run(attempt(own)) == 101
    assert asyncio.run(attempt("http://evil.example")) == 403
    assert asyncio.run(attempt("null")) == 403
    assert asyncio.run(attempt(f"http://127.0.0.1:{server.port + 1}")) == 403, "another port is another site"


@pytest.mark.slow
def test_two_servers_and_one_worker_share_nothing_but_the_database(hub: LoopbackHub, tmp_path: Path):
    """A download asked of one server is seen through the other one."""
    with Server(tmp_path / "one", env=hub.env(tmp_path / "hf")) as one:
        second = Server(tmp_path / "two", env=one.env)
        second.env = one.env
        with second as two:

            async def watch() -> None:
                sae_id = queued(one)
                async with connect(two) as socket:
                    await say(socket, action="subscribe", channel=f"sae/{sae_id}/download")
                    assert (await hear(socket))["event"] == "subscribed"
                    one.start_worker()
                    while (await hear(socket))["data"]["status"] != "ready":
                        pass

            asyncio.run(watch())


def test_nobody_watches_nothing_is_asked(server: Server, tmp_path: Path):
    """Clients that are gone, however they went, leave nothing behind that is polled for."""
    from mechint.server.db import Database
    from mechint.server.events import Events, Subscriber, parse_channel
    from mechint.server.models import Base, Revision, SharedSAE

    db = Database(f"sqlite:///{tmp_path / 'x.db'}")
    Base.metadata.create_all(db.engine)
    with db.write() as session:
        session.add(Revision(id=1, value=0))
        session.add(SharedSAE(id="sae_0123456789ab", name="x", source="local"))

    async def run() -> None:
        events = Events(db)
        channel = parse_channel("sae/sae_0123456789ab/download")
        assert channel is not None
        asked, read = [], events._changed
        events._changed = lambda ids: asked.append(ids) or read(ids)  # type: ignore[method-assign]
        subscriber = Subscriber()
        assert await events.subscribe(subscriber, channel)
        assert (await subscriber.take())[0]["data"]["status"] == "pending"
        assert not await events.subscribe(Subscriber(), channel._replace(sae_id="sae_000000000000"))
        task = events._task
        assert task is not None
        while not asked:
            await asyncio.sleep(0.01)
        assert all(ids == {channel.sae_id} for ids in asked) and not task.done()
        events.leave(subscriber)
        assert events.watching == 0
        await asyncio.wait_for(task, SECONDS)  # it ends by itself
        assert await events.subscribe(subscriber, channel), "and begins again"
        assert events._task is not task
        await events.stop()

    asyncio.run(run())
    db.close()
