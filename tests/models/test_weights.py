"""Reading weights files, and downloads that never hang and never leave half a file."""

import hashlib
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from regvq_fast.models import weights
from regvq_fast.models.weights import RemoteWeights, download_file, find_weights, read_state_dict, weights_hash

CONTENT = bytes(range(256)) * 4096  # 1 MiB
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Serves CONTENT, and every way in which a server can fail."""

    def do_GET(self):
        if self.path == "/missing":
            return self.send_error(404)
        if self.path == "/silent":
            return self.server.closing.wait()
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        body = b"<html>log in first</html>" if self.path == "/portal" else CONTENT
        if self.path == "/cut":
            body = body[: len(body) // 2]
        self.wfile.write(body[: len(body) // 2])
        if self.path == "/stall":
            self.server.closing.wait()
        while self.path == "/trickle" and not self.server.closing.wait(0.02):
            self.wfile.write(b"x")
        return self.wfile.write(body[len(body) // 2 :])

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.closing = threading.Event()
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.closing.set()
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def isolated(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(weights, "CONNECT_SECONDS", 0.5)
    monkeypatch.setattr(weights, "STALL_SECONDS", 0.5)
    monkeypatch.setenv("no_proxy", "*")


def test_download_into_the_cache(server, tmp_path):
    found = find_weights(RemoteWeights(f"{server}/file.pth", DIGEST[:8]))
    assert found == (tmp_path / "hub" / "checkpoints" / "file.pth", f"download:{server}/file.pth")
    assert found.path.read_bytes() == CONTENT
    assert [path.name for path in found.path.parent.iterdir()] == ["file.pth"]
    assert find_weights(RemoteWeights(f"{server}/file.pth", DIGEST[:8])).source == f"cache:{found.path}"


@pytest.mark.parametrize(
    ("page", "reason"),
    [
        ("missing", "404"),
        ("silent", r"127\.0\.0\.1 .*\b0\.5 s"),
        ("stall", "broke off"),
        ("trickle", "broke off"),
        ("cut", "broke off|incomplete"),
        ("portal", "broke off|incomplete"),
    ],
)
def test_a_failed_download_is_quick_and_leaves_nothing(server, tmp_path, page, reason):
    start = time.monotonic()
    with pytest.raises(OSError, match=reason):
        download_file(RemoteWeights(f"{server}/{page}", DIGEST[:8]), tmp_path / "file.pth")
    assert time.monotonic() - start < 5
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_hash_is_refused(server, tmp_path):
    with pytest.raises(OSError, match="not the expected file"):
        download_file(RemoteWeights(f"{server}/file.pth", "00000000"), tmp_path / "file.pth")
    assert list(tmp_path.iterdir()) == []


def test_slow_name_resolution_does_not_hang(tmp_path, monkeypatch):
    monkeypatch.setattr("socket.getaddrinfo", lambda *args, **kwargs: time.sleep(3))
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r"weights\.invalid"):
        download_file(RemoteWeights("http://weights.invalid/file.pth", DIGEST[:8]), tmp_path / "file.pth")
    assert time.monotonic() - start < 2


def test_nested_state_dict_in_half_precision(tmp_path):
    torch.save({"epoch": 1, "state_dict": {"a": torch.ones(2, dtype=torch.bfloat16)}}, tmp_path / "a.pt")
    (tensor,) = read_state_dict(tmp_path / "a.pt").values()
    assert tensor.dtype == torch.float32


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    torch.save({"a": Payload()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match=r"read .*evil\.pth"):
        read_state_dict(tmp_path / "evil.pth")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("name", ["damaged.pth", "damaged.safetensors"])
def test_a_damaged_file(tmp_path, name):
    (tmp_path / name).write_bytes(b"no weights")
    with pytest.raises(ValueError, match=f"read .*{name}"):
        read_state_dict(tmp_path / name)


def test_a_file_of_another_kind(tmp_path):
    with pytest.raises(ValueError, match=r"weights\.npz .*\.safetensors, \.pth, \.pt"):
        read_state_dict(tmp_path / "weights.npz")
    torch.save([torch.ones(1)], tmp_path / "list.pth")
    with pytest.raises(ValueError, match=r"list\.pth .*state dict"):
        read_state_dict(tmp_path / "list.pth")


def test_a_hash_is_of_the_weights():
    layer, same = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    same.load_state_dict(layer.state_dict())
    assert weights_hash(layer) == weights_hash(same)
    assert len(weights_hash(layer)) == 64
    assert weights_hash(same.bfloat16()) != weights_hash(layer.bfloat16().float())
    assert weights_hash(torch.nn.Sequential(layer)) != weights_hash(layer)
    before = weights_hash(layer)
    with torch.no_grad():
        layer.bias[0] += 1e-2
    assert weights_hash(layer) != before
