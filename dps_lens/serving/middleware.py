"""Around every request: who is let in, how much is read, and a line of the log."""

import ipaddress
import json
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from dps_lens.serving.failures import LOG, error_body, note_failure
from dps_lens.serving.keys import Key, Keys
from dps_lens.serving.metrics import Metrics

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

_HERE = ("127.0.0.1", "localhost", "[::1]")
_OPEN = ("/healthz",)


class Gate:
    """ASGI middleware that lets a request in.

    Without keys a server is for this machine only, so that a page of another site, which a browser of this machine
    shows, is refused by the names that the request gives for the server and for itself.

    Args:
        app: that is behind it.
        keys: that are let in.
        most_bytes: of a body.
    """

    def __init__(self, app: Any, *, keys: Keys, most_bytes: int) -> None:
        self._app, self._keys, self._most = app, keys, most_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        refused = self._refused(scope, headers)
        if refused is not None:
            await _answer(send, *refused)
            return
        body = await self._body(headers, receive)
        if body is None:
            await _answer(send, 413, f"the request is larger than {self._most} bytes", "request_too_large")
            return
        sent = False

        async def replay() -> MutableMapping[str, Any]:
            nonlocal sent
            if not sent:
                sent = True
                return {"type": "http.request", "body": body, "more_body": False}
            return await receive()

        await self._app(scope, replay, send)

    def _refused(self, scope: Scope, headers: dict[str, str]) -> tuple[int, str, str] | None:
        key: Key | None = None
        if self._keys.keys:
            key = self._keys.find(headers.get("authorization"))
            if key is None and scope["path"] not in _OPEN:
                return 401, "no valid key; send it as 'Authorization: Bearer KEY'", "invalid_api_key"
        else:
            client = scope.get("client")
            host, origin = headers.get("host", ""), headers.get("origin")
            named = host if host.startswith("[") and host.endswith("]") else host.rpartition(":")[0] or host
            foreign = origin is not None and urlsplit(origin).netloc != host
            if named not in _HERE or foreign or (client is not None and not is_here(client[0])):
                return 403, "this server has no keys, and answers this machine only, at 127.0.0.1", "forbidden"
        scope.setdefault("state", {})["key"] = key
        return None

    async def _body(self, headers: dict[str, str], receive: Receive) -> bytes | None:
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > self._most:
            return None
        parts, size, more = [], 0, True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                break
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self._most:
                return None
            more = message.get("more_body", False)
        return b"".join(parts)


class Notes:
    """ASGI middleware that writes a line of the log for each request, without a word of whoever asks, and counts it.

    Args:
        app: that is behind it.
        metrics: that count.
    """

    def __init__(self, app: Any, *, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begin, number, status = time.monotonic(), secrets.token_hex(8), 0
        scope.setdefault("state", {})["number"] = number

        async def noting(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                extra = [(b"x-request-id", number.encode()), (b"x-content-type-options", b"nosniff")]
                message = {**message, "headers": [*message.get("headers", ()), *extra]}
            await send(message)

        try:
            await self._app(scope, receive, noting)
        except Exception as error:
            note_failure(error)
            if status:
                raise
            await _answer(noting, 500, f"the server failed ({type(error).__name__})", "internal_error")
        finally:
            path, key = getattr(scope.get("route"), "path", "unknown"), scope["state"].get("key")
            self._metrics.requests.labels(path, status or "none").inc()
            line = {"id": number, "key": key.name if key else None, "path": path, "status": status}
            LOG.info(json.dumps({**line, "seconds": round(time.monotonic() - begin, 4)}))


def is_here(address: str) -> bool:
    """Whether an address is this machine's own."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


async def _answer(send: Send, status: int, message: str, code: str) -> None:
    body = json.dumps(error_body(status, message, code=code)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
