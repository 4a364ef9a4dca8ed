"""Web server of the demo page: its port, its temporary folder, and its timeouts."""

import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from regvq_fast.demo.guard import Guard
from regvq_fast.demo.uploads import MAX_BYTES

MAX_CONNECTIONS = 256

REQUEST_SECONDS = 10.0
"""Longest idle time of a connection, before its first request or between two."""


def listen(host: str, port: int) -> socket.socket:
    """Open the page's port.

    Raises:
        OSError: it can't be opened; the message is one sentence.
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
        make_page: makes the page, a `gradio.Blocks`; called after the environment is set.
        opened: a listening socket.
        local: as in `Guard`.
        ready: called before the first request is answered.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # exit normally, which removes the folder
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
        from uvicorn.protocols.http.h11_impl import H11Protocol

        class Impatient(H11Protocol):
            """A connection that is closed when idle, since the number of connections is limited."""

            def connection_made(self, transport: Any) -> None:
                super().connection_made(transport)
                self._look(self)

            def _look(self, before: object) -> None:
                waits = self.cycle is None or self.cycle.response_complete
                if waits and self.cycle is before:  # idle since the last check
                    self.transport.close()
                elif not self.transport.is_closing():
                    self.loop.call_later(REQUEST_SECONDS, self._look, self.cycle if waits else self)

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
        page.has_launched = True  # gradio checks files only then
        ready()
        config = uvicorn.Config(
            Guard(app, uploads, local),
            log_level="critical",  # the guard logs failures; other messages only report bad requests
            http=Impatient,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            limit_concurrency=MAX_CONNECTIONS,
            timeout_graceful_shutdown=2,
            ws="none",
        )
        uvicorn.Server(config).run(sockets=[opened])
