import io

import pytest
from rich.console import Console

from regvq_fast.console import progress_bar, stage


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
