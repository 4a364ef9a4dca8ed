"""Web server of the demo page: what it answers, to whom, and how much it takes.

The page needs few of the framework's routes; only these are answered. Files are read from the folder of uploads alone,
requests that name any other file or address are refused before the framework sees them, and the browser is told to
load nothing from elsewhere.
"""

import json
import os
import re
import signal
import socket
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

from regvq_fast.demo.uploads import MAX_BYTES

UPLOADS_BYTES = 512 * 2**20
"""Bytes of all uploads that are kept; beyond, the oldest go."""
MAX_BODY = 2**18
"""Bytes of a request that is no upload."""
MAX_CONNECTIONS = 256

_UPLOAD, _JOIN, _FILE = "/gradio_api/upload", "/gradio_api/queue/join", "/gradio_api/file="
_READS = re.compile(
    r"/|/(assets|static)/[\w./+-]+|(/gradio_api)?/theme\.css|/favicon\.ico|/manifest\.json"
    r"|/gradio_api/(startup-events|queue/data|upload_progress|heartbeat/\w+)"
)
_WRITES = (_UPLOAD, _JOIN)
_FORM = 64 * 2**10  # bytes that a form adds to its file
_DRAINED = 4 * MAX_BYTES  # largest request that is read to its end before it is refused
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
    """Answer to a request that is not passed on."""

    status: int
    reason: str
    """One sentence."""


class Guard:
    """ASGI middleware that passes on what the page needs, and refuses everything else.

    Args:
        app: the page.
        uploads: folder of the uploads, the only one that files are read from.
        local: answer only requests to an address of this machine, so that no web site can reach the page through a
            name of its own.
    """

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]], uploads: Path, local: bool) -> None:
        self.app, self.uploads, self.local = app, uploads.resolve(), local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        path, headers = scope["path"], {name.decode("latin-1"): value for name, value in scope["headers"]}
        refusal = self._refusal(scope["method"], path, headers)
        if refusal is None and path == _JOIN:
            body = await _read(receive)
            refusal = self._foreign(body)
            receive = _replay(body, receive)
        added = _FILE_HEADERS if path.startswith(_FILE) else _HEADERS
        if refusal is not None:
            if refusal.status == 413 and int(headers["content-length"]) <= _DRAINED:
                await _read(receive, keep=False)  # who is cut off while sending never sees the answer
            await _answer(send, refusal)
            return
        if path == _UPLOAD:
            make_room(self.uploads, UPLOADS_BYTES - MAX_BYTES)

        async def send_with_headers(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *_encoded(added)]
            await send(message)

        await self.app(scope, receive, send_with_headers)

    def _refusal(self, method: str, path: str, headers: dict[str, bytes]) -> Refusal | None:
        if self.local and _host(headers.get("host", b"")) not in ("127.0.0.1", "localhost", "::1"):
            return Refusal(421, "This page answers to 127.0.0.1 and localhost only.")
        if method in ("GET", "HEAD"):
            known = self._is_upload(path.removeprefix(_FILE)) if path.startswith(_FILE) else _is_read(path)
            return None if known else Refusal(404, "There is nothing here.")
        if method != "POST" or path not in _WRITES:
            return Refusal(404, "There is nothing here.")
        limit = MAX_BYTES + _FORM if path == _UPLOAD else MAX_BODY
        length = headers.get("content-length", b"")
        if not length.isdigit():
            return Refusal(411, "A request has to state its length.")
        if int(length) > limit:
            what = f"a file has at most {MAX_BYTES // 2**20} MiB" if path == _UPLOAD else "at most 256 KiB"
            return Refusal(413, f"The request is too large: {what}.")
        return None

    def _foreign(self, body: bytes) -> Refusal | None:
        """Refuse a request for work that is no JSON, or names a file that is not an upload, or an address."""
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
        except (ValueError, OSError, RuntimeError):  # null bytes, long names, circles of links
            return False


def make_room(folder: Path, limit: int) -> None:
    """Delete the oldest files of a folder until the others have at most ``limit`` bytes."""
    found = []
    for path in folder.rglob("*"):
        try:
            status = path.stat()
        except FileNotFoundError:
            continue
        if path.is_file():
            found.append((status.st_mtime, status.st_size, path))
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total <= limit:
            break
        path.unlink(missing_ok=True)
        total -= size


def listen(host: str, port: int) -> socket.socket:
    """Open the page's port.

    Raises:
        OSError: it can't be opened, in one sentence.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        opened = socket.socket(family, kind, protocol)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind(address)
        opened.listen(MAX_CONNECTIONS)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OSError(f"can't listen on {host}, port {port} ({reason}): choose others with --host and --port") from None
    return opened


def serve(make_page: Callable[[], Any], opened: socket.socket, local: bool, ready: Callable[[], object]) -> None:
    """Serve a page until the process is interrupted or terminated.

    Args:
        make_page: makes the page, a `gradio.Blocks`, once the environment is set.
        opened: a listening socket.
        local: as in `Guard`.
        ready: called before the first request is answered.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leave by way of the folder's removal
    with tempfile.TemporaryDirectory(prefix="regvq-demo-") as folder:
        uploads = Path(folder).resolve()
        os.environ |= {
            "GRADIO_TEMP_DIR": str(uploads),
            "GRADIO_ANALYTICS_ENABLED": "False",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "GRADIO_MCP_SERVER": "False",
            "GRADIO_SSR_MODE": "False",
        }
        import fastapi
        import gradio
        import uvicorn

        page = make_page()
        page.state_session_capacity = MAX_CONNECTIONS
        styled = {name: getattr(page, f"demo_{name}") for name in ("theme", "css", "head")}
        app = gradio.mount_gradio_app(
            fastapi.FastAPI(openapi_url=None, docs_url=None, redoc_url=None),
            page,
            path="/",
            footer_links=[],
            run_history=False,
            allowed_paths=[],
            show_error=False,
            max_file_size=MAX_BYTES,
            ssr_mode=False,
            enable_monitoring=False,
            **styled,
        )
        page.has_launched = True  # files are checked from then on only
        ready()
        config = uvicorn.Config(
            Guard(app, uploads, local),
            log_level="warning",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            limit_concurrency=MAX_CONNECTIONS,
            timeout_graceful_shutdown=2,
            ws="none",
        )
        uvicorn.Server(config).run(sockets=[opened])


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


async def _read(receive: Receive, keep: bool = True) -> bytes:
    chunks, more = [], True
    while more:
        message = await receive()
        chunks.append(message.get("body", b"") if keep else b"")
        more = message["type"] == "http.request" and message.get("more_body", False)
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
