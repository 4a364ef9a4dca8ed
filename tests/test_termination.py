"""SIGTERM and SIGHUP leave no unfinished files, and no signal is lost."""

import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tyro

from regvq_fast.config import run_command
from regvq_fast.files import atomic_path
from regvq_fast.termination import removes_unfinished

ENDING = (signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class Flags:
    """Flags of a command."""

    out: Path


@pytest.mark.parametrize("number", ENDING)
def test_a_command_removes_its_unfinished_file(number: signal.Signals, tmp_path: Path) -> None:
    def work(flags: Flags) -> None:
        with atomic_path(flags.out) as temporary:
            temporary.touch()
            signal.raise_signal(number)

    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as ended:
        run_command("sample", Flags, work, "", ["--out", str(tmp_path / "samples.npz")])
    assert ended.value.code == 128 + number
    assert os.listdir(tmp_path) == []
    assert signal.getsignal(number) == before


def test_ctrl_c_while_flags_are_parsed_has_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def parse(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tyro, "cli", parse)
    with pytest.raises(SystemExit) as ended:
        run_command("sample", Flags, print, "", [], stopped="images are in {out}")
    assert (ended.value.code, capsys.readouterr().err) == (130, "stopped\n")


def test_removal_is_not_disturbed_by_another_hangup_but_ended_by_another_sigterm() -> None:
    """A closing terminal sends SIGHUP twice."""

    def ended_and_closed() -> None:
        with removes_unfinished():
            try:
                signal.raise_signal(signal.SIGTERM)
            finally:
                signal.raise_signal(signal.SIGHUP)
                assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL

    with pytest.raises(SystemExit, match=str(128 + signal.SIGTERM)):
        ended_and_closed()


def test_nohup_is_kept() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with removes_unfinished():
            signal.raise_signal(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_processes_of_torchrun_end_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """They wait for each other outside of Python, which could not handle the signal there."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"):
        monkeypatch.setenv(name, "0")
    before = [signal.getsignal(number) for number in ENDING]
    with removes_unfinished():
        assert [signal.getsignal(number) for number in ENDING] == before
