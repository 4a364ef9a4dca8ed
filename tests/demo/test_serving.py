"""The page's server under attack by files, addresses, sizes and broken requests."""

import http.server
import json
import math
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.demo_server import DemoServer, as_file
from helpers.hostile_images import encoded, gradient, refused, valid_oddities

from regvq_fast.demo.guard import LEAST_BYTES, Guard, make_room
from regvq_fast.demo.serving import listen
from regvq_fast.demo.uploads import MAX_BYTES


@pytest.fixture
def elsewhere() -> Iterator[tuple[str, list[str]]]:
    """An address on this machine, and the paths that it was asked for."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *_: object) -> None:
            pass

    other = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=other.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{other.server_address[1]}/image.png", asked
    other.shutdown()


@pytest.mark.parametrize("name", valid_oddities())
def test_odd_images_are_reconstructed(server: DemoServer, name: str) -> None:
    status, paths = server.upload(valid_oddities()[name], name)
    assert status == 200
    succeeded, shown = server.call("reconstruct", as_file(paths[0]))
    assert succeeded
    assert "dB" in shown


def test_hostile_files_get_a_sentence(server: DemoServer, alive: None) -> None:
    for name, (content, word) in refused().items():
        status, paths = server.upload(content, name)
        assert status == 200
        succeeded, error = server.call("reconstruct", as_file(paths[0]))
        assert not succeeded
        assert word in error, (name, error)
        assert "/" not in error, error


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file=../../../../etc/passwd",
        "/gradio_api/file=%2Fetc%2Fpasswd",
        "/gradio_api/file={uploads}/../../etc/passwd",
        "/gradio_api/file={uploads}/%2e%2e/%2e%2e/etc/passwd",
        "/gradio_api/file={uploads}/%252e%252e/%252e%252e/etc/passwd",
        "/gradio_api/file={uploads}",
        "/gradio_api/file={uploads}/%00",
        "/gradio_api/file=pyproject.toml",
        "/gradio_api/file/etc/passwd",
        "/file=/etc/passwd",
        "/static/../../../../../../../../etc/passwd",
        "/static/%2e%2e/%2e%2e/config.py",
        "/assets/..%2f..%2f..%2frun.py",
        "/svelte/../../../etc/passwd",
        "/gradio_api/proxy=http://127.0.0.1:9/",
        "/gradio_api/stream/a/b/1/playlist-file",
        "/gradio_api/custom_component/1/server/component/x.py",
        "/config",
        "/gradio_api/info",
        "/gradio_api/openapi.json",
        "/openapi.json",
        "/docs",
        "/monitoring",
        "/gradio_api/runs",
        "/gradio_api/queue/status",
        "//etc/passwd",
    ],
)
def test_nothing_but_the_page_is_read(server: DemoServer, path: str) -> None:
    _, paths = server.upload(encoded(gradient()))
    uploads = Path(paths[0]).parents[1]
    status, answer = server.ask("GET", path.format(uploads=uploads))
    assert status == 404
    assert answer == b'{"detail": "There is nothing here."}'


@pytest.mark.parametrize("method", ["PUT", "DELETE", "OPTIONS", "PATCH", "TRACE"])
def test_other_methods(server: DemoServer, method: str) -> None:
    assert server.ask(method, "/")[0] == 404


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/component_server",
        "/gradio_api/run/reconstruct",
        "/gradio_api/call/map",
        "/gradio_api/process_recording",
        "/gradio_api/vibe-edit",
        "/gradio_api/reset",
        "/login",
    ],
)
def test_only_uploads_and_work_are_posted(server: DemoServer, path: str) -> None:
    assert server.ask("POST", path, b"{}", {"Content-Type": "application/json"})[0] == 404


def test_uploads_are_served_and_run_nothing(server: DemoServer) -> None:
    _, paths = server.upload(refused()["page.svg"][0], "page.svg")
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=30)
    with connection:
        request = f"GET /gradio_api/file={paths[0]} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        connection.sendall(request.encode())
        answer = b"".join(iter(lambda: connection.recv(65536), b"")).decode().lower()
    assert answer.startswith("http/1.1 200")
    assert "default-src 'none'; sandbox" in answer
    assert "nosniff" in answer


@pytest.mark.parametrize("where", ["path", "url", "both"])
def test_no_address_is_fetched(server: DemoServer, elsewhere: tuple[str, list[str]], where: str, alive: None) -> None:
    address, asked = elsewhere
    _, paths = server.upload(encoded(gradient()))
    value = as_file(paths[0] if where == "url" else address)
    if where != "path":
        value["url"] = address
    for name in ("reconstruct", "caption"):
        values = [value] if name == "reconstruct" else [value, 1, 0, 1, 1, 1]
        server.call(name, *values)
    assert server.ask("GET", f"/gradio_api/file={address}")[0] == 404
    time.sleep(0.5)
    assert asked == []


@pytest.mark.parametrize("path", ["/etc/passwd", "../../etc/passwd", "pyproject.toml", "", "/proc/self/environ", "\0"])
def test_no_file_of_the_server_is_taken_for_an_upload(server: DemoServer, path: str, alive: None) -> None:
    for values in ([as_file(path)], [{"path": path}], [[{"x": as_file(path)}]], [as_file(path, url="data:,x")]):
        succeeded, error = server.call("reconstruct", *values)
        assert not succeeded
        assert "not uploaded here" in error


def test_requests_that_are_none(server: DemoServer, alive: None) -> None:
    deep = b"[" * 100_000 + b"]" * 100_000
    escaped = json.dumps({"data": [as_file("/etc/passwd")]}).replace("path", "\\u0070ath").encode()
    for body, status in ((b"", 400), (b"{", 400), (deep, 400), (b"\xff\xfe", 400), (escaped, 403), (b"[]", 422)):
        assert server.join(body)[0] == status, body[:20]
    for values in ([], ["x"] * 50, [{}], [7], [None], [{"path": 3}]):
        succeeded, error = server.call("reconstruct", *values)
        assert not succeeded
        assert "/site-packages/" not in error


def test_settings_that_a_page_does_not_send(server: DemoServer, alive: None) -> None:
    for values in (
        ["a cat", 1e9, 0, 1, 1, 1],
        ["a cat", "x", 0, 1, 1, 1],
        ["a cat", 1, 0, None, 1, 1],
    ):
        succeeded, error = server.call("caption", *values)
        assert not succeeded
        assert error
    for values in (["00", 1, 0, 1, 1, 1], ["ff" * 4096, 1, 0, 1, 1, 1], [{"a": [1] * 1000}, 1, 0, 1, 1, 1]):
        succeeded, error = server.call("map", *values)
        assert not succeeded
        assert "map" in error


WRONG = [None, math.nan, math.inf, -1, "x", [], {}, {"a": math.nan}, True, [[]] * 50, "\ud800", "x" * 200_000, 10**300]


@pytest.mark.parametrize("name", ["map", "caption", "label", "any"])
def test_wrong_values_get_a_sentence(server: DemoServer, alive: None, name: str) -> None:
    settings = [1, 0, 1, 1]
    right = {"map": ["00" * 4096, *settings, 1], "caption": ["a cat", *settings, 2], "label": ["cow", *settings, 2]}
    right["any"] = settings
    for place in range(len(right[name])):
        for wrong in WRONG:
            values = [wrong if k == place else value for k, value in enumerate(right[name])]
            succeeded, answer = server.call(name, *values)
            default, text = place == 5 and wrong is None, (name, place) == ("caption", 0)
            assert not succeeded or default or (text and isinstance(wrong, str)), (place, wrong)
            if not succeeded:
                assert "must be a number" in answer or (place == 0 and name != "any"), (place, wrong, answer)
                assert len(answer) < 400
                assert " " in answer


def test_what_the_framework_fails_at_is_an_answer(server: DemoServer, alive: None) -> None:
    _, paths = server.upload(encoded(gradient()))
    work = {"data": [], "session_hash": "s"}
    bodies = [work | {"fn_index": number} for number in (-1, 10**9)] + [work | {"fn_index": 0, "trigger_id": math.inf}]
    answers = [server.join(json.dumps(body).encode()) for body in bodies]
    kind = {"Content-Type": "multipart/form-data; boundary=" + "b" * 5000}
    answers.append(server.ask("POST", "/gradio_api/upload", b"--b", kind))
    ranges = {"Range": "bytes=" + ",".join(f"{k}-{k}" for k in range(5000))}
    answers.append(server.ask("GET", f"/gradio_api/file={paths[0]}", headers=ranges))
    assert [status for status, _ in answers] == [500] * len(answers)
    assert all("The request failed" in str(answer) for _, answer in answers)
    assert server.ask("GET", "/assets/" + "a/" * 3000)[0] == 404


@pytest.mark.parametrize("path", ["/gradio_api/upload", "/gradio_api/queue/join"])
def test_other_web_sites_send_nothing(server: DemoServer, path: str) -> None:
    for origin in (
        "https://evil.example",
        "null",
        "http://127.0.0.1.evil.example",
        f"http://evil.example:{server.port}",
    ):
        status, answer = server.ask("POST", path, b"{}", {"Origin": origin, "Content-Type": "application/json"})
        assert (status, b"another web site" in answer) == (403, True)
    own = {"Origin": server.url.rstrip("/"), "Content-Type": "application/json"}
    assert server.ask("POST", path, b"{}", own)[0] not in (403, 404)


def test_markup_in_a_caption_stays_text(server: DemoServer) -> None:
    succeeded, shown = server.call("caption", "<img src=x onerror=alert(1)> cat", 1, 0, 1, 1, 1)
    assert succeeded
    assert "<img src=x" not in shown
    assert "&lt;img src=x" in shown


def test_sizes_are_limited(server: DemoServer, alive: None) -> None:
    kind = {"Content-Type": "application/json"}
    assert server.ask("POST", "/gradio_api/queue/join", None, kind | {"Content-Length": str(2**40)})[0] == 413
    assert server.ask("POST", "/gradio_api/queue/join", b"{}", kind | {"Content-Length": "-2"})[0] in (400, 411)
    assert server.ask("POST", "/gradio_api/upload", None, {"Transfer-Encoding": "chunked"})[0] == 411
    status, answer = server.upload(bytes(MAX_BYTES + 2**17))
    assert status == 413
    assert "10 MiB" in answer["detail"]


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", ""])
def test_other_names_of_this_machine_are_refused(server: DemoServer, host: str) -> None:
    assert server.ask("GET", "/", headers={"Host": host})[0] == 421


def test_the_oldest_uploads_go(tmp_path: Path) -> None:
    for number in range(6):
        path = tmp_path / str(number) / "image.png"
        path.parent.mkdir()
        path.write_bytes(bytes(1000))
        os.utime(path, (number, number))
    make_room(tmp_path, 2 * LEAST_BYTES)  # tiny ones count, too
    assert sorted(path.name for path in tmp_path.iterdir()) == ["4", "5"]


def test_a_port_in_use_is_a_sentence() -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"port {port}.*--port"):
            listen("127.0.0.1", port)
    with pytest.raises(OSError, match="--host"):
        listen("no.such.host.invalid", 7860)


def test_another_host_is_answered_where_it_was_asked_for(tmp_path: Path) -> None:
    async def page(*_: object) -> None: ...

    headers = {"host": b"demo.example"}
    assert Guard(page, tmp_path, local=False)._refusal("GET", "/", headers) is None
    assert Guard(page, tmp_path, local=True)._refusal("GET", "/", headers) is not None
