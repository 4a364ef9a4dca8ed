"""The progress bar keeps counter, bar and time left at any width."""

import io
import re

import pytest
from rich.console import Console

from regvq_fast.console import Items, progress_bar, say, stage


@pytest.mark.parametrize("terminal", [True, False])
def test_a_stage_has_a_bar_on_a_terminal_and_a_line_every_ten_seconds_elsewhere(
    monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    now = 100.0
    written = io.StringIO()
    console = Console(file=written, force_terminal=terminal, width=100)
    monkeypatch.setattr("regvq_fast.console.time.monotonic", lambda: now)
    with progress_bar(console) as progress:
        with stage(progress, "sampling, steps") as show:
            for done in range(1, 9):
                now += 3.0
                show(done, 8)
                progress.refresh()
        assert not progress.tasks
    if terminal:
        assert "8/8" in written.getvalue()
        assert "sampling, steps" in written.getvalue()
    else:
        assert written.getvalue().splitlines() == ["sampling, steps 4/8", "sampling, steps 8/8"]


@pytest.mark.parametrize("terminal", [True, False])
def test_a_long_value_wraps_between_words_on_a_terminal_only(terminal: bool) -> None:
    written = io.StringIO()
    value = "none: " + "a reason in words, " * 5 + "runs/" + "x" * 70
    say(Console(file=written, force_terminal=terminal, width=80, color_system=None), "left out", value)
    first, *others = written.getvalue().splitlines()
    assert first.startswith("          left out  none: ")
    assert " ".join([first[20:], *(line[20:] for line in others)]) == value
    assert len(others) == (2 if terminal else 0)
    assert all(line[:20].isspace() for line in others)
    assert not terminal or (len(first) <= 80 and others[-1].endswith("runs/" + "x" * 70)), "a path stays whole"


ITEMS = ["loss 0.123", "l1 0.123", "utilization 100 %", "1,234 images/s", "perceptual 0.123", "kl 0.12", "lambda 0.75"]


def rendered(items, width: int, monkeypatch, world_size: int = 1) -> list[str]:
    monkeypatch.setattr("regvq_fast.console.world_size", lambda: world_size)
    console = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)
    progress = progress_bar(console, Items(items))
    progress.add_task("step", total=1_000_000, completed=654_321)
    with console.capture() as capture:
        console.print(progress.get_renderable())
    return capture.get().splitlines()


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("world_size", [1, 8])
def test_counter_bar_and_time_left_stay_whole(monkeypatch, width, world_size):
    if width == 60 and world_size > 1:
        pytest.skip("too narrow for the name of the rank")
    bar, items = rendered(ITEMS, width, monkeypatch, world_size)
    assert re.fullmatch(r"step( \(rank 0 of 8\))?  654321/1000000 [━╸╺]{5,} +0:00:00 · -:--:-- left", bar.strip())
    assert len(bar) <= width
    shown = items.strip().split(" · ")
    assert shown == ITEMS[: len(shown)], "items are dropped whole, from the right"
    room = width - len(" · ".join(ITEMS[: len(shown) + 1]))
    assert len(shown) == len(ITEMS) or room < 0
    assert len(shown) == {60: 4, 80: 5, 120: 7}[width]


def test_a_single_item_is_cut_with_an_ellipsis(monkeypatch):
    _, line = rendered(["compiling " * 12], 80, monkeypatch)
    assert len(line) == 80
    assert line.endswith("…")
