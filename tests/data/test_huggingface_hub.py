"""Hugging Face data sets by their names on the hub, of which a stand-in serves the files."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.flat_images import level_of, levels_of
from helpers.stand_in_hub import StandInHub, running_hub, use_hub

from regvq_fast.data import HuggingFaceImages, HuggingFaceStream
from regvq_fast.evaluation.fid import describe_data

datasets = pytest.importorskip("datasets")
from helpers.hugging_face import quiet_datasets, table  # noqa: E402


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInHub]:
    """A hub with a data set of five training images, and of three of validation; of two in its second commit."""
    for name, levels in (("train", range(5)), ("three", (100, 110, 120)), ("two", (200, 210))):
        table(levels).to_parquet(tmp_path / f"{name}.parquet")
    with running_hub() as hub:
        use_hub(monkeypatch, hub.endpoint, tmp_path, token=None)
        quiet_datasets(monkeypatch, tmp_path / "cache")
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.endpoint)
        train, three, two = ((tmp_path / f"{name}.parquet").read_bytes() for name in ("train", "three", "two"))
        card = b"---\nlicense: mit\n---\n"
        repository = hub.add("me/images", {"README.md": card, "train-0.parquet": train, "test-0.parquet": three})
        repository.refs["v1"] = repository.refs["main"]
        repository.commit({"README.md": card, "train-0.parquet": train, "test-0.parquet": two})
        yield hub


def test_main_branch_and_revisions(hub: StandInHub) -> None:
    val = HuggingFaceImages("hf:me/images", "val", 8)
    assert levels_of(val) == [200, 210]
    assert levels_of(HuggingFaceImages("hf:me/images@v1", "val", 8)) == [100, 110, 120]
    assert sorted(levels_of(HuggingFaceImages("hf:me/images?image=image", "train", 8))) == list(range(5))
    assert describe_data(val)["data"] == "hf:me/images"


def test_a_downloaded_data_set_needs_no_network(hub: StandInHub, monkeypatch: pytest.MonkeyPatch) -> None:
    first = describe_data(HuggingFaceImages("hf:me/images", "val", 8))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    before = len(hub.requests)
    assert describe_data(HuggingFaceImages("hf:me/images", "val", 8)) == first
    assert len(hub.requests) == before


def test_a_stream_keeps_nothing_on_the_disk(hub: StandInHub, tmp_path: Path) -> None:
    stream = HuggingFaceStream("hf:me/images?stream&length=5", "train", 8)
    assert sorted(level_of(stream[k]) for k in range(5)) == list(range(5))
    assert not list((tmp_path / "cache").rglob("*.arrow"))


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("me/nothing", FileNotFoundError, "me/nothing is neither a folder here nor a data set on .* log in"),
        ("me/images@v9", FileNotFoundError, "me/images .* no revision 'v9'"),
        ("me/gated", PermissionError, "me/gated .* is gated: ask for access .* log in"),
        ("me/private", FileNotFoundError, "me/private .* if it is private, log in"),
    ],
)
@pytest.mark.parametrize("ending", ["", "?stream"])
def test_what_the_hub_refuses(hub: StandInHub, name: str, kind: type[OSError], message: str, ending: str) -> None:
    for state in ("gated", "private"):
        hub.add(f"me/{state}", {"README.md": b"", "train-0.parquet": b""}, **{state: True})
    with pytest.raises(kind, match=message) as caught:
        (HuggingFaceStream if ending else HuggingFaceImages)(f"hf:{name}{ending}")
    assert "\n" not in str(caught.value)


def test_a_hub_that_can_not_be_reached(hub: StandInHub) -> None:
    hub.broken = 400  # of the errors the one after which its clients don't try again for half a minute
    with pytest.raises(OSError, match=r"me/images .* can't be reached .* network"):
        HuggingFaceImages("hf:me/images")
