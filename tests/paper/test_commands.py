"""Processes of commands: signals reach them once, also while they start."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import forkserver

import pytest

from regvq_fast.paper import commands
from regvq_fast.paper.commands import Commands


@pytest.fixture
def child(tmp_path, monkeypatch):
    """A module whose function `work(folder, name)` runs until a signal, which it writes down."""
    module = """
import os, signal, sys, time
def work(folder, name):
    def stop(number, frame):
        open(f"{folder}/{name}-{number}", "a").write("x")  # saves its work
        sys.exit(128 + number)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    open(f"{folder}/{name}-ready", "w").close()
    time.sleep(600)
"""
    (tmp_path / "child.py").write_text(module)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    return tmp_path


DRIVER = """
import signal, sys
from concurrent.futures import ThreadPoolExecutor
import child
from regvq_fast.paper import commands
commands._SERVER.set_forkserver_preload(["regvq_fast.paper.commands"])
if __name__ == "__main__":
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # where nohup runs the tests it is ignored
    with commands.Commands(2) as two, ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda name: two.run(child.work, sys.argv[1], name), "ab"))
"""


def start_driver(child):
    process = subprocess.Popen([sys.executable, "-c", DRIVER, str(child)], stderr=subprocess.PIPE)
    start = time.monotonic()
    while len(list(child.glob("*-ready"))) < 2:
        assert time.monotonic() - start < 180
        time.sleep(0.05)
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_reach_commands_that_save_their_work_and_end_the_driver(child, number):
    process = start_driver(child)
    os.kill(process.pid, number)  # to this process alone, as kill and a batch system do
    _, error = process.communicate(timeout=300)
    passed = signal.SIGTERM if number == signal.SIGHUP else number
    assert [(child / f"{name}-{passed}").read_text() for name in "ab"] == ["x", "x"]  # once each
    assert process.returncode == 128 + number or (number == signal.SIGINT and b"KeyboardInterrupt" in error)


def test_commands_save_their_work_and_end_when_the_driver_is_killed(child):
    process = start_driver(child)
    process.kill()
    process.communicate(timeout=60)  # the commands have its output, too
    assert [(child / f"{name}-{signal.SIGTERM}").read_text() for name in "ab"] == ["x", "x"]


def test_a_signal_while_a_command_starts_reaches_it(monkeypatch):
    start = commands._SERVER.Process.start

    def slow_start(process):
        start(process)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(commands._SERVER.Process, "start", slow_start)
    begin = time.monotonic()
    with pytest.raises(SystemExit) as stopped, Commands() as one:
        one.run(time.sleep, 600)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert time.monotonic() - begin < 300


def test_a_server_that_is_killed_is_a_sentence(monkeypatch):
    def start(self):
        raise EOFError("unexpected EOF")

    monkeypatch.setattr(commands._SERVER.Process, "start", start)
    with Commands() as running, pytest.raises(OSError, match="was killed; run the same command again"):
        running.run(print)


def test_a_command_that_ends_while_another_starts_has_its_own_status(monkeypatch):
    read, files = forkserver.read_signed, []

    def slow_read(file):
        files.append(file)
        if len(files) == 2:  # the first command's status, after its id
            time.sleep(2)
        return read(file)

    monkeypatch.setattr(forkserver, "read_signed", slow_read)
    with Commands(2) as two, ThreadPoolExecutor(1) as pool:
        first = pool.submit(two.run, os._exit, 3)
        while len(files) < 2:
            time.sleep(0.01)
        assert two.run(os._exit, 5) == 5
        assert first.result() == 3
