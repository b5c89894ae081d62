"""`/ws`: subscribe to channels, receive their events. Nothing that a client sends reaches another one.

    -> {"action": "subscribe", "channel": "sae/sae_0123456789ab/download"}
    <- {"event": "subscribed", "channel": "sae/sae_0123456789ab/download"}
    <- {"event": "sae:download", "channel": ..., "data": {sae_id, progress, status, message, stage, ...}}
    -> {"action": "unsubscribe", "channel": ...}
    <- {"event": "unsubscribed", "channel": ...}
    <- {"event": "error", "channel": ..., "message": ...}      what was not understood, or does not exist

Answers come in the order of the requests, and an event never before its `subscribed`.
"""

import contextlib
import json
from collections.abc import Coroutine
from typing import Any

import anyio
from starlette.websockets import WebSocket, WebSocketDisconnect

from mechint.server.events import Events, Subscriber, parse_channel

MAX_MESSAGE = 4096  # characters
MAX_CHANNELS = 1000  # of one connection
MAX_CONNECTIONS = 2000  # of one server process
# A connection that sends nonsense without end is closed.
MAX_MISTAKES = 100
_open = 0


async def channel(socket: WebSocket) -> None:
    """One connection, from its beginning to its end."""
    global _open
    if _open >= MAX_CONNECTIONS:
        await socket.close(1013, "too many connections")
        return
    _open += 1
    events: Events = socket.app.state.events
    subscriber = Subscriber()
    try:
        await socket.accept()
        async with anyio.create_task_group() as group:
            # whichever ends first ends the other: a client that is gone is noticed by either
            group.start_soon(_until_gone, group, _send(socket, subscriber))
            group.start_soon(_until_gone, group, _receive(socket, subscriber, events))
    finally:
        _open -= 1
        events.leave(subscriber)


async def _until_gone(group: Any, work: Coroutine[Any, Any, None]) -> None:
    with contextlib.suppress(WebSocketDisconnect, RuntimeError, OSError):  # what sending to a closed connection raises
        await work
    group.cancel_scope.cancel()


async def _send(socket: WebSocket, subscriber: Subscriber) -> None:
    while True:
        for message in await subscriber.take():
            await socket.send_text(json.dumps(message, separators=(",", ":")))


async def _receive(socket: WebSocket, subscriber: Subscriber, events: Events) -> None:
    mistakes = 0
    while True:
        message = await socket.receive()
        if message["type"] == "websocket.disconnect":
            return
        text = message.get("text")
        if text is None or len(text) > MAX_MESSAGE:
            await _close(socket, 1003 if text is None else 1009, "only short text messages are understood")
            return
        problem = await _act(socket, subscriber, events, text)
        if problem is not None:
            mistakes += 1
            await _tell(socket, problem)
            if mistakes >= MAX_MISTAKES:
                await _close(socket, 1008, "too many messages that are not understood")
                return


async def _act(socket: WebSocket, subscriber: Subscriber, events: Events, text: str) -> dict[str, Any] | None:
    """Do what a message asks. The answer to one that cannot be followed, or None."""
    try:
        asked = json.loads(text)
    except (ValueError, RecursionError):
        return {"event": "error", "message": "not JSON"}
    if not isinstance(asked, dict):
        return {"event": "error", "message": "expected an object with action and channel"}
    action, wanted = asked.get("action"), parse_channel(asked.get("channel"))
    if action not in ("subscribe", "unsubscribe"):
        return {
            "event": "error",
            "message": "the actions are subscribe and unsubscribe; events come from the server only",
        }
    if wanted is None:
        return {"event": "error", "message": "unknown channel: expected sae/ID/download or sae/ID/upload"}
    if action == "unsubscribe":
        events.unsubscribe(subscriber, wanted)
        await _tell(socket, {"event": "unsubscribed", "channel": wanted.name})
        return None
    if len(subscriber.channels) >= MAX_CHANNELS and wanted not in subscriber.channels:
        return {"event": "error", "channel": wanted.name, "message": f"at most {MAX_CHANNELS} channels a connection"}
    subscriber.hold()
    try:
        if not await events.subscribe(subscriber, wanted):
            return {"event": "error", "channel": wanted.name, "message": f"SAE not found: {wanted.sae_id}"}
        await _tell(socket, {"event": "subscribed", "channel": wanted.name})
    finally:
        subscriber.release()
    return None


async def _tell(socket: WebSocket, message: dict[str, Any]) -> None:
    await socket.send_text(json.dumps(message, separators=(",", ":")))


async def _close(socket: WebSocket, code: int, reason: str) -> None:
    with contextlib.suppress(RuntimeError, OSError):
        await socket.close(code, reason)
