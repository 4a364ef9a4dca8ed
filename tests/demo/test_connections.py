"""The page's server with many clients: full queues, idle and slow connections, clients that leave, its end."""

import asyncio
import json
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from helpers.demo_server import DemoServer, as_file, demo_server, save_tiny_models
from helpers.hostile_images import encoded, gradient

from regvq_fast.demo import guard
from regvq_fast.demo.guard import MAX_STREAMS, Guard, Receive
from regvq_fast.demo.serving import MAX_CONNECTIONS


def test_many_clients_at_once_are_served(server: DemoServer, alive: None) -> None:
    content = encoded(gradient())

    def visit(number: int) -> tuple[bool, str]:
        if number % 3:
            return server.call("caption", "a cat on the left and bricks on the right", 1, number, 1, 1, 2)
        return server.call("reconstruct", as_file(server.upload(content)[1][0]))

    with ThreadPoolExecutor(30) as pool:
        answers = list(pool.map(visit, range(30)))
    assert [error for succeeded, error in answers if not succeeded] == []


def test_a_full_queue_is_an_answer(server: DemoServer, alive: None) -> None:
    function = server.function("caption")

    def join(number: int) -> tuple[int, Any]:
        data = ["a cat", 8, number, 1, 1, 6]
        return server.join(json.dumps({"data": data, "fn_index": function, "session_hash": f"s{number}"}).encode())

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(join, range(80)))
    statuses = [status for status, _ in answers]
    assert set(statuses) == {200, 503}
    assert all("ueue" in str(answer["detail"]) for status, answer in answers if status == 503)
    for _ in range(300):  # until it is worked off
        if join(1000)[0] == 200:
            break
        time.sleep(0.2)
    time.sleep(3)


def test_idle_connections_do_no_harm(server: DemoServer, alive: None) -> None:
    idle = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(50)]
    for connection in idle:
        connection.sendall(b"POST /gradio_api/upload HTTP/1.1\r\nHost: localhost\r\nContent-Le")
    assert server.ask("GET", "/")[0] == 200
    for connection in idle:
        connection.close()


def connect(server: DemoServer, request: str) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=60)
    connection.sendall(request.encode())
    return connection


def test_connections_without_a_request_are_closed(server: DemoServer, alive: None) -> None:
    whole = "GET /favicon.ico HTTP/1.1\r\nHost: localhost\r\n\r\n"
    half = "POST /gradio_api/upload HTTP/1.1\r\nHost: localhost\r\nContent-Le"
    slow = [connect(server, [half, "", whole + half][k % 3]) for k in range(MAX_CONNECTIONS + 40)]
    assert server.ask("GET", "/")[0] == 503
    time.sleep(6)
    assert server.ask("GET", "/")[0] == 200
    for connection in slow:
        connection.close()


def test_heartbeats_leave_room_for_the_page(server: DemoServer, alive: None) -> None:
    beats = [
        connect(server, f"GET /gradio_api/heartbeat/s{k} HTTP/1.1\r\nHost: localhost\r\n\r\n")
        for k in range(MAX_STREAMS + 20)
    ]
    statuses = [connection.recv(12) for connection in beats]
    assert statuses.count(b"HTTP/1.1 200") == MAX_STREAMS
    assert statuses.count(b"HTTP/1.1 503") == 20
    assert server.call("caption", "a cat", 1, 0, 1, 1, 2)[0]
    for connection in beats:
        connection.close()


def test_clients_that_leave_are_forgotten(server: DemoServer, alive: None) -> None:
    head = "POST /gradio_api/upload HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=b\r\n"
    part = '--b\r\nContent-Disposition: form-data; name="files"; filename="x.png"\r\n\r\n' + "x" * 10**6
    for _ in range(10):
        connect(server, f"{head}Content-Length: {2 * 10**6}\r\n\r\n{part}").close()
    function = server.function("caption")
    for number in range(25):
        body = {"data": ["a cat", 8, number, 1, 1, 6], "fn_index": function, "session_hash": f"gone{number}"}
        assert server.join(json.dumps(body).encode())[0] == 200
        data = f"GET /gradio_api/queue/data?session_hash=gone{number} HTTP/1.1\r\nHost: localhost\r\n\r\n"
        connect(server, data).close()
    assert server.call("caption", "a cat", 1, 0, 1, 1, 2)[0]


def test_a_body_has_to_arrive_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def never() -> dict[str, object]:
        await asyncio.sleep(60)
        return {}

    async def page(scope: object, receive: Receive, send: object) -> None:
        assert (await receive())["type"] == "http.disconnect"
        raise ClientDisconnect

    class ClientDisconnect(Exception):
        pass

    monkeypatch.setattr(guard, "_SECONDS", dict.fromkeys(guard._SECONDS, 0.05))
    for path in guard._SECONDS:
        sent: list[dict[str, Any]] = []

        async def send(message: Any, sent: list[dict[str, Any]] = sent) -> None:
            sent.append(message)

        headers = [(b"host", b"localhost"), (b"content-length", b"5")]
        scope = {"type": "http", "method": "POST", "path": path, "headers": headers}
        asyncio.run(Guard(page, tmp_path, local=True)(scope, never, send))
        assert [message.get("status") for message in sent] == [408, None]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_page_ends_under_open_tabs(tmp_path: Path, number: signal.Signals) -> None:
    pytest.importorskip("gradio", reason="the page needs gradio")
    save_tiny_models(tmp_path / "models")
    with demo_server(tmp_path / "models", tmp_path / "errors.log") as server:
        uploads = Path(server.upload(encoded(gradient()))[1][0]).parents[1]
        tab = connect(server, "GET /gradio_api/heartbeat/s HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert tab.recv(12) == b"HTTP/1.1 200"
        server.process.send_signal(number)
        assert server.process.wait(60) == 128 + number
        assert not uploads.exists()
        assert "Traceback" not in server.log.read_text()
