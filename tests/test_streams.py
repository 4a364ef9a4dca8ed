"""Output that is lost, or that its encoding can't hold, does not end a command."""

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.runs import FAST, SCRIPT, TINY, records

from regvq_fast import streams

PRINTS = """
import os, sys
from regvq_fast.streams import survive_lost_output
survive_lost_output(warns={})
survive_lost_output()
for line in range(3):
    print("20 · 1", os.fsdecode(b"caf\\xe9"), flush=True)
    os.write(1, b"a child's line\\n") if {} else None
print("the end", file=sys.stderr)
"""


def run_python(code: str, **options: object) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, timeout=60, check=False, **options)  # type: ignore[call-overload]


def closed_pipe() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


@pytest.mark.parametrize("warns", [True, False])
def test_a_pipe_without_a_reader_takes_one_warning_and_nothing_else(warns: bool) -> None:
    done = run_python(PRINTS.format(warns, True), stdout=closed_pipe())
    assert done.returncode == 0
    lines = done.stderr.decode().splitlines()
    assert lines[-1] == "the end"
    assert len(lines) == 1 + warns
    assert ("Broken pipe" in lines[0]) == warns


@pytest.mark.parametrize("encoding", ["ascii", "utf-8:strict", "latin-1"])
def test_characters_that_the_encoding_lacks_become_escapes(encoding: str) -> None:
    done = run_python(
        PRINTS.format(True, False), stdout=subprocess.PIPE, env={**os.environ, "PYTHONIOENCODING": encoding}
    )
    assert done.returncode == 0
    dot = "\\xb7" if encoding == "ascii" else "·"
    line = f"20 {dot} 1 caf\\udce9".encode(encoding.partition(":")[0])
    assert done.stdout.splitlines() == [line] * 3


def test_a_full_disk_loses_only_what_it_has_no_room_for() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    with open("/dev/full", "wb") as full:
        done = run_python(PRINTS.format(True, False), stdout=full)
    assert done.returncode == 0
    assert [line.partition(":")[0] for line in done.stderr.decode().splitlines()] == ["warning", "the end"]


def test_closed_streams_are_not_given_to_files(tmp_path: Path) -> None:
    code = "from regvq_fast.streams import survive_lost_output as s; s(); f = open('data', 'w'); print(1, flush=True)"
    command = f'{sys.executable} -c "{code}" <&- >&- 2>&-'
    path = os.fspath(Path(streams.__file__).parents[1])
    done = subprocess.run(command, shell=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, timeout=60)
    assert done.returncode == 0
    assert (tmp_path / "data").read_text() == ""


def test_a_programs_own_streams_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    own = io.StringIO()
    monkeypatch.setattr(sys, "stdout", own)
    streams.survive_lost_output()
    assert sys.stdout is own


def test_a_run_goes_on_when_nobody_reads_it(tmp_path: Path) -> None:
    """As `train | head -1` in a terminal that closes, on which characters are ASCII."""
    out = tmp_path / "run"
    command = [sys.executable, str(SCRIPT), *TINY, *FAST, "--out", str(out), "--steps", "60", "--checkpoint-every", "0"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        assert process.stdout
        assert process.stderr
        while not process.stdout.readline().startswith(b"step 4/60"):
            assert process.poll() is None, process.stderr.read()
        process.stdout.close()
        while len(records(out)) < 6:
            assert process.poll() is None, process.stderr.read()
        for _ in range(2):
            process.send_signal(signal.SIGHUP)
        said = process.stderr.read().decode()
        assert process.wait(60) == 128 + signal.SIGHUP
    assert said.count("warning: ") == said.count("Broken pipe") == 1
    assert "stopped by SIGHUP after step " in said.splitlines()[-1]
    (checkpoint,) = (out / "checkpoints").iterdir()
    assert checkpoint.name in said.splitlines()[-1]
