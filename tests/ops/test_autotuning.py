"""The opt-in search for tiles: what it tries, what it keeps; timing itself needs a GPU and is replaced."""

import pytest
import torch

pytest.importorskip("triton")

import triton

from regvq_fast.kernels import schedules

KIND = ("vector_quantize", "fused", torch.bfloat16, 256, (1024, "noise"), torch.device("cpu"))


@pytest.fixture
def timed(monkeypatch):
    """The tiles that were timed; the fastest is the pinned one with half its rows."""
    tiles = []
    monkeypatch.setattr(schedules, "_tuned", {})

    def milliseconds(run):
        tile = run()
        tiles.append(tile)
        return 0.5 if tile.BM == schedules.tile(*KIND[:4], KIND[5]).BM // 2 else 1.0

    monkeypatch.setattr(schedules, "milliseconds", milliseconds)
    return tiles


def test_without_the_variable_the_pinned_tile_runs_and_nothing_is_timed(timed, monkeypatch):
    monkeypatch.delenv("REGVQ_AUTOTUNE", raising=False)
    assert schedules.run(*KIND, lambda tile: tile) == schedules.tile(*KIND[:4], KIND[5])
    assert timed == []


@pytest.mark.parametrize("value", ["", "0", "true"])
def test_nothing_but_1_asks_for_the_search(value, timed, monkeypatch):
    monkeypatch.setenv("REGVQ_AUTOTUNE", value)
    if value == "true":
        with pytest.raises(ValueError, match="REGVQ_AUTOTUNE must be 0 or 1, got 'true'"):
            schedules.run(*KIND, lambda tile: tile)
    else:
        schedules.run(*KIND, lambda tile: tile)
    assert timed == []


def test_the_fastest_neighbour_runs_and_is_remembered(timed, monkeypatch):
    monkeypatch.setenv("REGVQ_AUTOTUNE", "1")
    pinned = schedules.tile(*KIND[:4], KIND[5])
    chosen = schedules.run(*KIND, lambda tile: tile)
    assert chosen.BM == pinned.BM // 2
    assert timed[0] == pinned
    assert len(timed) == len(set(timed)) > 20
    count = len(timed)
    assert schedules.run(*KIND, lambda tile: tile) == chosen
    assert len(timed) == count


def test_calls_of_another_kind_are_searched_by_themselves(timed, monkeypatch):
    monkeypatch.setenv("REGVQ_AUTOTUNE", "1")
    schedules.run(*KIND, lambda tile: tile)
    count = len(timed)
    schedules.run(*KIND[:4], (1024, "no noise"), KIND[5], lambda tile: tile)
    assert len(timed) == 2 * count


def test_tiles_that_do_not_fit_are_passed_over(timed, monkeypatch):
    monkeypatch.setenv("REGVQ_AUTOTUNE", "1")
    pinned = schedules.tile(*KIND[:4], KIND[5])

    def launch(tile):
        if tile.BM < pinned.BM:
            raise triton.runtime.errors.OutOfResources(300_000, 232_448, "shared memory")
        return tile

    assert schedules.run(*KIND, launch).BM >= pinned.BM
