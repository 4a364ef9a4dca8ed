"""Fixtures that tests of several modules share, and the marks that tests get by what they do.

Plain functions that tests share are in `helpers`.
"""

import inspect
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import pytest
import torch

pytest.register_assert_rewrite("helpers")

TESTS = Path(__file__).parent
BENCH = TESTS.parent / "bench"
DOCS = {"test_docs.py", "test_readme.py", "test_integration_docs.py", "test_site.py"}
# A test that gets to one of these names starts processes, compiles, runs kernels in the interpreter or a whole command.
NOT_UNIT = set(
    "subprocess multiprocessing runpy Popen DataLoader compile opcheck kernels Trainer train evaluate cache_tokens "
    "generate reproduce manage_data main fit".split()
)


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist makes processes of the number
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Leave out slow tests where none are named; run folders of tests in several processes unless -n says otherwise.

    There is a process of one thread for each core, up to four. A file or a test is run here; so is everything on a GPU,
    which the processes would share.
    """
    option = config.option
    if config.args_source is not pytest.Config.ArgsSource.ARGS and not option.markexpr and not option.keyword:
        option.markexpr = "not slow"
    asked = getattr(option, "numprocesses", 0) is not None or option.usepdb or hasattr(config, "workerinput")
    if asked or torch.cuda.is_available() or not all(Path(argument).is_dir() for argument in config.args):
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if cores > 1:
        option.numprocesses, option.dist = min(4, cores), "worksteal"
        os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is about the documents or bench/, what needs a GPU, and what is a unit test."""
    for item in items:
        if not isinstance(item, pytest.Function):
            continue
        if item.path.name in DOCS:
            item.add_marker("docs")
        if any(_is_of_bench(value) for value in vars(item.module).values()):
            item.add_marker("bench")
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
        if not any(item.get_closest_marker(name) for name in ("slow", "gpu", "docs")) and not NOT_UNIT & _names(item):
            item.add_marker("unit")


def _is_of_bench(value: object) -> bool:
    module = sys.modules.get(getattr(value, "__module__", None) or getattr(value, "__name__", None) or "")
    return Path(getattr(module, "__file__", None) or "").parent == BENCH


def _names(item: pytest.Function) -> set[str]:
    """Return the names in a test, its fixtures and the functions of tests/ that they call."""
    fixtures = item._fixtureinfo.name2fixturedefs.values()
    waiting: list[Callable] = [item.function, *(definition.func for same in fixtures for definition in same)]
    names: set[str] = set()
    seen = set()
    while waiting:
        function = inspect.unwrap(waiting.pop())
        if not isinstance(function, FunctionType) or function in seen:
            continue
        seen.add(function)
        found = _names_in(function.__code__)
        names |= found
        if TESTS in Path(function.__code__.co_filename).parents:
            waiting += [value for name in found if callable(value := function.__globals__.get(name))]
    return names


def _names_in(code: CodeType) -> set[str]:
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*map(_names_in, inner))


@pytest.fixture
def cache_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, in place of the user's own."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


@pytest.fixture
def no_downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Weights of feature networks neither from the user's cache nor from the network; the empty cache's folder."""
    from regvq_fast.evaluation import feature_nets
    from regvq_fast.models import features
    from regvq_fast.models.weights import RemoteWeights

    nowhere = RemoteWeights("http://127.0.0.1:9/weights.pth", "0000")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    for net in features.IMAGENET_WEIGHTS:
        monkeypatch.setitem(features.IMAGENET_WEIGHTS, net, nowhere)
    monkeypatch.setattr(feature_nets, "INCEPTION_WEIGHTS", nowhere)
    return tmp_path / "hub" / "checkpoints"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A stand-in of the Hugging Face Hub that huggingface_hub speaks with: `helpers.stand_in_hub.StandInHub`."""
    from helpers.stand_in_hub import running_hub, use_hub

    with running_hub() as running:
        use_hub(monkeypatch, running.endpoint, tmp_path / "hf")
        yield running


@pytest.fixture(scope="module")
def few_regions() -> Iterator[None]:
    """Fit the classifier of regions to 128 scenes, enough for every class: 768 of them take twelve seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("regvq_fast.scenes.evaluation.FITTED_TO", 128)
        yield
