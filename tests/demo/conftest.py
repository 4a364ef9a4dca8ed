"""One running page for all tests of this folder."""

from collections.abc import Iterator

import pytest
from helpers.demo_server import DemoServer, demo_server, save_tiny_models


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DemoServer]:
    """A page on models of a few weights."""
    pytest.importorskip("gradio", reason="the page needs gradio")
    folder = tmp_path_factory.mktemp("demo")
    save_tiny_models(folder / "models")
    with demo_server(folder / "models", folder / "errors.log") as running:
        yield running
