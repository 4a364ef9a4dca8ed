"""Guard of the demo page: a filter of requests, with limits.

Only the few routes of the framework that the page needs are answered. Requests that name a file outside the upload
folder, or an address, are refused before the framework sees them. A content security policy keeps the browser from
loading anything from elsewhere.
"""

import asyncio
import json
import logging
import re
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from regvq_fast.demo.uploads import MAX_BYTES

logger = logging.getLogger("regvq_fast")

UPLOADS_BYTES = 512 * 2**20
"""Largest size of all uploads in bytes; above it, the oldest are deleted."""
LEAST_BYTES = 2**18
"""Smallest size in bytes that an upload counts as: many tiny files would exhaust the disk's inodes."""
MAX_BODY = 2**18
"""Largest body in bytes of a request other than an upload."""
MAX_STREAMS = 128
"""Largest number of open heartbeats. The framework keeps one per browser tab; a tab also works without it."""

_UPLOAD, _JOIN, _FILE, _HEARTBEAT = (f"/gradio_api/{name}" for name in ("upload", "queue/join", "file=", "heartbeat/"))
_READS = re.compile(
    r"/|/(assets|static)/[\w./+-]{1,200}|(/gradio_api)?/theme\.css|/favicon\.ico|/manifest\.json"
    r"|/gradio_api/(startup-events|queue/data|upload_progress|heartbeat/\w{1,100})"
)
_SECONDS = {_UPLOAD: 300.0, _JOIN: 30.0}  # time limit of the body, by path
_FORM = 64 * 2**10  # bytes that a form adds to its file
_DRAINED = 4 * MAX_BYTES  # largest body that is read before it is refused
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data: blob:; font-src 'self' data:; object-src 'none'; frame-ancestors 'none'; "
        "form-action 'self'; base-uri 'self'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
_FILE_HEADERS = _HEADERS | {"Content-Security-Policy": "default-src 'none'; sandbox"}

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class Refusal(NamedTuple):
    """Answer to a refused request."""

    status: int
    reason: str
    """One sentence."""


_NOTHING = Refusal(404, "There is nothing here.")
_LATE = Refusal(408, "The request did not arrive in time: try again.")
_FAILED = Refusal(500, "The request failed.")


class Guard:
    """ASGI middleware that passes on the requests that the page needs, and refuses all others.

    An exception in the page gives one line in the log and an answer, not a traceback per request.

    Args:
        app: the page.
        uploads: folder of uploads, the only one whose files are served.
        local: answer only requests to an address of this machine, which prevents DNS rebinding by other web sites.
    """

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]], uploads: Path, local: bool) -> None:
        self.app, self.uploads, self.local = app, uploads.resolve(), local
        self._streams = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        path, headers = scope["path"], {name.decode("latin-1"): value for name, value in scope["headers"]}
        refusal = self._refusal(scope["method"], path, headers)
        if path in _SECONDS:
            receive = _in_time(receive, _SECONDS[path])
        if refusal is None and path == _JOIN:
            body = await _read(receive)
            refusal = _LATE if body is None else self._foreign(body)
            receive = _replay(body or b"", receive)
        if refusal is not None:
            if refusal.status == 413 and int(headers["content-length"]) <= _DRAINED:
                await _read(receive, keep=False)  # a client that is cut off while sending never sees the answer
            await _answer(send, refusal)
            return
        if path == _UPLOAD:
            make_room(self.uploads, UPLOADS_BYTES - MAX_BYTES)
        streams = path.startswith(_HEARTBEAT)
        self._streams += streams
        try:
            await self._pass_on(scope, receive, send)
        finally:
            self._streams -= streams

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        added = _FILE_HEADERS if scope["path"].startswith(_FILE) else _HEADERS
        status = 0

        async def send_with_headers(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), *_encoded(added)]
            if status != 500:  # the framework sends its own error page, then raises
                await send(message)

        answer = _FAILED
        try:
            await self.app(scope, receive, send_with_headers)
        except Exception as error:
            if type(error).__name__ == "ClientDisconnect":  # also after a timeout
                answer = _LATE
            else:
                logger.warning("%s %s failed: %.200r", scope["method"], scope["path"], error)
        if status in (0, 500):
            await _answer(send, answer)

    def _refusal(self, method: str, path: str, headers: dict[str, bytes]) -> Refusal | None:
        host = _host(headers.get("host", b""))
        if self.local and host not in ("127.0.0.1", "localhost", "::1"):
            return Refusal(421, "This page answers to 127.0.0.1 and localhost only.")
        if method in ("GET", "HEAD"):
            known = self._is_upload(path.removeprefix(_FILE)) if path.startswith(_FILE) else _is_read(path)
            if path.startswith(_HEARTBEAT) and self._streams >= MAX_STREAMS:
                return Refusal(503, "The page has too many visitors.")
            return None if known else _NOTHING
        if method != "POST" or path not in _SECONDS:
            return _NOTHING
        if (origin := headers.get("origin")) is not None and _host(urlsplit(origin).netloc) != host:
            return Refusal(403, "A page of another web site sent this request.")
        limit = MAX_BYTES + _FORM if path == _UPLOAD else MAX_BODY
        length = headers.get("content-length", b"")
        if not length.isdigit():
            return Refusal(411, "A request has to state its length.")
        if int(length) > limit:
            what = f"a file has at most {MAX_BYTES // 2**20} MiB" if path == _UPLOAD else "at most 256 KiB"
            return Refusal(413, f"The request is too large: {what}.")
        return None

    def _foreign(self, body: bytes) -> Refusal | None:
        """Return a refusal of a body that is not JSON, or that names an address or a file that was not uploaded."""
        try:
            paths = list(_paths(json.loads(body)))
        except (ValueError, RecursionError):
            return Refusal(400, "The request is not valid.")
        if all(isinstance(path, str) and self._is_upload(path) for path in paths):
            return None
        return Refusal(403, "The file was not uploaded here, or is no longer kept: upload it again.")

    def _is_upload(self, path: str) -> bool:
        try:
            found = Path(unquote(path)).resolve()
            return found.is_relative_to(self.uploads) and found.is_file() and unquote(path) == path
        except (ValueError, OSError, RuntimeError):  # null bytes, long names, circular links
            return False


def make_room(folder: Path, limit: int) -> None:
    """Delete the oldest files of a folder until the others count as at most ``limit`` bytes."""
    found = []
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):
            status = path.stat()
            if path.is_file():
                found.append((status.st_mtime, max(status.st_size, LEAST_BYTES), path))
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total <= limit:
            break
        path.unlink(missing_ok=True)
        if path.parent != folder:
            with suppress(OSError):  # another upload is in it
                path.parent.rmdir()
        total -= size


def _is_read(path: str) -> bool:
    return _READS.fullmatch(path) is not None and ".." not in path


def _host(header: bytes) -> str:
    """Return the host of a Host header, without its port."""
    return re.sub(r":\d+$", "", header.decode("latin-1")).strip("[]").lower()


def _paths(value: Any) -> Iterator[Any]:
    """Yield all values under "path" or "file_path" in a JSON value."""
    if isinstance(value, dict):
        yield from (inner for name, inner in value.items() if name in ("path", "file_path"))
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            yield from _paths(inner)


def _encoded(headers: dict[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.lower().encode(), value.encode()) for name, value in headers.items()]


def _in_time(receive: Receive, seconds: float) -> Receive:
    """Limit the time to receive a body; a slower sender counts as disconnected."""
    end, more = asyncio.get_running_loop().time() + seconds, True

    async def received() -> MutableMapping[str, Any]:
        nonlocal more
        try:
            async with asyncio.timeout_at(end if more else None):
                message = await receive()
        except TimeoutError:
            message = {"type": "http.disconnect"}
        more = message["type"] == "http.request" and message.get("more_body", False)
        return message

    return received


async def _read(receive: Receive, keep: bool = True) -> bytes | None:
    """Return a body; None if the sender disconnected."""
    chunks, more = [], True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            return None
        chunks.append(message.get("body", b"") if keep else b"")
        more = message.get("more_body", False)
    return b"".join(chunks)


def _replay(body: bytes, receive: Receive) -> Receive:
    waiting = [body]

    async def again() -> MutableMapping[str, Any]:
        if waiting:
            return {"type": "http.request", "body": waiting.pop(), "more_body": False}
        return await receive()

    return again


async def _answer(send: Send, refusal: Refusal) -> None:
    body = json.dumps({"detail": refusal.reason}).encode()
    headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), "Connection": "close"}
    await send({"type": "http.response.start", "status": refusal.status, "headers": _encoded(_HEADERS | headers)})
    await send({"type": "http.response.body", "body": body})
