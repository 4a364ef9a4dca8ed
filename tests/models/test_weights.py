"""Reading weights files, and downloads that never hang and never leave half a file."""

import hashlib
import importlib
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from regvq_fast.models import weights
from regvq_fast.models.features import IMAGENET_WEIGHTS, load_vgg_features
from regvq_fast.models.weights import (
    LoadedWeights,
    RemoteWeights,
    download_file,
    find_weights,
    read_state_dict,
    strip_prefix,
    weights_hash,
)

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
    monkeypatch.setattr(weights, "STALL_SECONDS", 0.8)  # the connection gives up first
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
        ("stall", "was interrupted"),
        ("trickle", "was interrupted"),
        ("cut", "was interrupted|incomplete"),
        ("portal", "was interrupted|incomplete"),
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
    with pytest.raises(ValueError, match=r"evil\.pth .*state dict"):
        read_state_dict(tmp_path / "evil.pth")
    torch.save({"state_dict": {"a": torch.ones(1)}, "callbacks": [Payload()]}, tmp_path / "last.ckpt")
    assert read_state_dict(tmp_path / "last.ckpt").keys() == {"a"}
    assert not (tmp_path / "owned").exists()
    torch.save({"a": Payload()}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"read .*old\.pth.*safely$"):
        read_state_dict(tmp_path / "old.pth")
    assert not (tmp_path / "owned").exists()


def test_a_lightning_checkpoint_is_read_without_its_classes(tmp_path, monkeypatch):
    """Callbacks are listed by their classes, settings are of a class of Lightning's, a dict."""
    source = tmp_path / "lightning_like.py"
    source.write_text(
        "class AttributeDict(dict): pass\n"
        "class ModelCheckpoint:\n"
        "    def __init__(self): self.best = 1\n"
        "raise_here = __import__('os').environ.get('NOT_AGAIN') and 1 / 0\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("lightning_like")
    content = {
        "epoch": 3,
        "callbacks": {module.ModelCheckpoint: {"best_model_score": torch.ones(())}},
        "kept": module.ModelCheckpoint(),
        "state_dict": {"a": torch.arange(3.0)},
    }
    torch.save(content, tmp_path / "last.ckpt")
    torch.save(content | {"hyper_parameters": module.AttributeDict(lr=1)}, tmp_path / "settings.ckpt")
    monkeypatch.delitem(sys.modules, "lightning_like")
    monkeypatch.setenv("NOT_AGAIN", "1")
    assert read_state_dict(tmp_path / "last.ckpt")["a"].tolist() == [0, 1, 2]
    assert read_state_dict(tmp_path / "settings.ckpt").keys() == {"a"}
    assert "lightning_like" not in sys.modules


@pytest.mark.parametrize("content", [b"", b"no weights", b"PK\x03\x04 half a file"])
def test_a_damaged_file_in_the_cache_is_to_be_deleted(tmp_path, content):
    (cache := tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    (cache / IMAGENET_WEIGHTS["vgg16"].file_name).write_bytes(content)
    with pytest.raises(ValueError, match=r"vgg16.*\.pth: .*; delete it") as error:
        load_vgg_features("vgg16")
    assert "weights_only" not in str(error.value)
    assert "\n" not in str(error.value)
    assert ("empty" in str(error.value)) == (content == b"")


EXPECTED = {"encoder.conv_in.weight": 0, "encoder.conv_in.bias": 0, "quantize.embedding.weight": 0}


@pytest.mark.parametrize("prefix", ["", "module.", "first_stage_model.", "module.first_stage_model.", "tokenizer."])
def test_one_prefix_is_stripped(prefix):
    others = {"transformer.head.weight": 1, "cond_stage_model.encoder.conv_in.weight": 2}
    found = strip_prefix({prefix + name: 0 for name in EXPECTED} | others, EXPECTED, "this model")
    assert found.prefix == prefix
    assert {name for name, value in found.state_dict.items() if value == 0} == set(EXPECTED)
    assert found.outside == (tuple(others) if prefix else ())


def test_the_mark_of_compilation_is_stripped_wherever_it_is():
    given = {"_orig_mod.module.encoder._orig_mod.conv_in.weight": 7}
    assert strip_prefix(given, EXPECTED, "this model") == ({"encoder.conv_in.weight": 7}, "module.", ())


def test_no_prefix_or_several_are_refused():
    with pytest.raises(ValueError, match=r"none of the 0 names .*this model.*conv_in"):
        strip_prefix({}, EXPECTED, "this model")
    with pytest.raises(ValueError, match=r"'head\.bias'.*conv_in"):
        strip_prefix({"head.bias": 0}, EXPECTED, "this model")
    both = {f"{model}.{name}": 0 for name in EXPECTED for model in ("teacher", "student")}
    with pytest.raises(ValueError, match=r"teacher\. and with student\."):
        strip_prefix(both, EXPECTED, "this model")


def test_a_report_of_loaded_weights():
    assert str(LoadedWeights(3)) == "3 tensors loaded"
    left_out = ("loss.a", "loss.b", "colorize")
    assert str(LoadedWeights(3, left_out, "module.")) == (
        "3 tensors loaded from module.*, 3 left out (loss.* 2, colorize 1)"
    )


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
