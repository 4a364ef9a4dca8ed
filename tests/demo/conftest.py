"""One running page for all tests of this folder, and a check that it still works."""

from collections.abc import Iterator

import pytest
from helpers.demo_server import DemoServer, as_file, demo_server, save_tiny_models
from helpers.hostile_images import encoded, gradient


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DemoServer]:
    """A page on models of a few weights."""
    pytest.importorskip("gradio", reason="the page needs gradio")
    folder = tmp_path_factory.mktemp("demo")
    save_tiny_models(folder / "models")
    with demo_server(folder / "models", folder / "errors.log") as running:
        yield running


@pytest.fixture
def alive(server: DemoServer) -> Iterator[None]:
    """After the test the page still works, and no handler of ours has met an error that it did not expect."""
    yield
    status, paths = server.upload(encoded(gradient()))
    assert status == 200
    succeeded, shown = server.call("reconstruct", as_file(paths[0]))
    assert succeeded, shown
    assert server.process.poll() is None
    logged = server.log.read_text()
    assert "a request to the demo failed" not in logged
    assert "ASGI application" not in logged
