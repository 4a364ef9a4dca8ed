import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from helpers.flat_images import write_flat
from PIL import Image
from torch.utils.data import Dataset

from regvq_fast.data import ImageFolder, training_batches, validation_batches
from regvq_fast.data.datasets import build_dataset
from regvq_fast.data.loading import TimedBatches, default_workers, in_order, spread_samples
from regvq_fast.data.workers import WorkerLoader, WorkersFailed, start_worker
from regvq_fast.scenes import ScenesDataset


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def same(first, second) -> bool:
    return (
        torch.equal(first["image"], second["image"])
        and torch.equal(first["segmentation"], second["segmentation"])
        and first["caption"] == second["caption"]
    )


def test_batches_hold_samples_in_index_order():
    dataset = ScenesDataset("train", 16, length=5)
    first, second = take(training_batches(dataset, 3, start=4), 2)
    assert first["image"].shape == (3, 3, 16, 16)
    assert first["segmentation"].shape == (3, 16, 16)
    assert second["caption"] == [dataset[index]["caption"] for index in (7, 8, 9)]  # past the "epoch" of 5
    assert torch.equal(second["image"][1], dataset[8]["image"])


def test_the_stream_depends_on_neither_workers_nor_batch_size():
    dataset = ScenesDataset("train", 16)
    alone = take(training_batches(dataset, 4), 6)
    assert all(map(same, alone, take(training_batches(dataset, 4, workers=2), 6)))
    resumed = take(training_batches(dataset, 4, start=8), 4)
    assert all(map(same, alone[2:], resumed))
    large = next(training_batches(dataset, 24))
    assert torch.equal(large["image"], torch.cat([batch["image"] for batch in alone]))


def test_validation_keeps_the_last_batch_and_can_be_repeated():
    loader = validation_batches(ScenesDataset("val", 16, length=7), 3)
    first, again = list(loader), list(loader)
    assert [len(batch["image"]) for batch in first] == [3, 3, 1]
    assert all(map(same, first, again))
    assert len(loader) == 3


def test_the_global_generator_is_left_alone():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    dataset = ScenesDataset("val", 16, length=4)
    take(training_batches(dataset, 2, workers=1), 1)
    list(validation_batches(dataset, 2))
    assert torch.equal(torch.get_rng_state(), state)


ALL_VALIDATION = "batches = validation_batches(data, 4, workers=1)\nfor _ in batches: pass"


class AboutTheProcess(Dataset):
    """Samples that say how many compute threads their process has and whether it ignores Ctrl-C."""

    def __getitem__(self, index):
        ignores = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        return {"image": torch.tensor([os.getpid(), torch.get_num_threads(), int(ignores)])}


def test_workers_keep_to_one_thread_and_leave_interrupts_to_the_parent():
    pid, threads, ignores = next(training_batches(AboutTheProcess(), 1, workers=1))["image"][0].tolist()
    assert pid != os.getpid()
    assert threads == 1
    assert ignores


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_workers_start_is_not_lost(number):
    """Python ignores exceptions of the hooks of a fork; a signal that arrives in the fork is handled in one of them."""
    forks = []
    os.register_at_fork(after_in_parent=lambda: forks and signal.raise_signal(forks.pop()))
    before = signal.signal(number, signal.default_int_handler)
    try:
        forks.append(number)
        with pytest.raises(KeyboardInterrupt):
            training_batches(AboutTheProcess(), 1, workers=1)
        assert not forks
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, before)


def test_a_worker_is_silent_about_a_parent_that_ended_while_it_received_a_batch(capfd):
    for error in (ConnectionResetError(104, "Connection reset by peer"), ValueError("a defect")):
        worker = multiprocessing.get_context("fork").Process(target=report_as_a_worker, args=(error,))
        worker.start()
        worker.join(20)
    said = capfd.readouterr().err
    assert "ValueError: a defect" in said
    assert "Connection" not in said


def report_as_a_worker(error) -> None:
    start_worker(0)
    sys.excepthook(type(error), error, None)
    sys.stderr.flush()


def test_workers_that_cannot_start_are_one_error(monkeypatch):
    """As on a full disk; PyTorch's iterator, deleted half made, adds none of its own."""

    def full():
        raise OSError(27, "File too large")

    ignored = []
    monkeypatch.setattr(sys, "unraisablehook", ignored.append)
    monkeypatch.setattr(torch.multiprocessing, "Queue", full)
    with pytest.raises(OSError, match="too large"):
        training_batches(AboutTheProcess(), 1, workers=1)
    gc.collect()
    assert not ignored


def wait_as_a_worker(ready) -> None:
    start_worker(0)
    ready.set()
    time.sleep(60)


def test_a_worker_leaves_the_first_sigterm_to_its_parent_and_obeys_the_second():
    """Not by a loader: PyTorch raises an error in the main thread, wherever it is, when a worker is killed."""
    fork = multiprocessing.get_context("fork")
    ready = fork.Event()
    worker = fork.Process(target=wait_as_a_worker, args=(ready,), daemon=True)
    worker.start()
    assert ready.wait(20)
    worker.terminate()
    worker.join(0.3)
    assert worker.is_alive()
    worker.terminate()
    worker.join(20)
    assert worker.exitcode == -signal.SIGTERM


def test_an_error_in_a_worker_reaches_the_caller(tmp_path):
    for name in ("train/0.png", "train/1.png", "val/0.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (64, 64)).save(tmp_path / name)
    dataset = ImageFolder(tmp_path, "train", 16)
    for name in ("0.png", "1.png"):
        (tmp_path / "train" / name).write_bytes(b"")
    with pytest.raises(ValueError, match="none of the 2 images"):
        next(training_batches(dataset, 1, workers=1))


def test_build_dataset(tmp_path):
    scenes = build_dataset(None, split="val", image_size=32, length=9, seed=1)
    assert isinstance(scenes, ScenesDataset)
    assert torch.equal(scenes[3]["image"], ScenesDataset("val", 32, 9, 1)[3]["image"])
    for k in range(200):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{k}.png")
    folder = build_dataset(tmp_path, split="val", image_size=8, length=2, crop="center", flip=False)
    assert isinstance(folder, ImageFolder)
    assert (len(folder), folder.crop, folder.flip) == (2, "center", False)
    assert len(build_dataset(tmp_path, split="train", image_size=8, length=2)) > 100


@pytest.mark.parametrize(
    ("cores", "processes", "workers"),
    [(1, 1, 0), (2, 1, 0), (3, 1, 1), (8, 1, 4), (64, 1, 8), (8, 2, 2), (8, 8, 1), (128, 8, 8), (2, 2, 0)],
)
def test_default_workers(monkeypatch, cores, processes, workers):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)), raising=False)
    assert default_workers(processes) == workers


def test_waiting_for_batches_is_timed_and_nothing_else_is(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def slow():
        for k in range(3):
            clock[0] += 0.5
            yield k
        clock[0] += 2
        raise OSError("the disk is gone")

    batches = TimedBatches(slow())
    assert batches.waited() == 0
    assert take(batches, 2) == [0, 1]
    clock[0] += 30  # the step
    assert batches.waited() == 1
    assert batches.waited() == 0
    assert next(batches) == 2
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)
    assert batches.waited() == 2.5


def test_batches_of_a_data_set_are_timed_and_their_workers_end_with_them():
    batches = training_batches(AboutTheProcess(), 1, workers=1)
    worker = int(next(batches)["image"][0, 0])
    assert batches.waited() > 0
    os.kill(worker, 0)
    del batches
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)


def test_bad_arguments_name_the_value():
    dataset = ScenesDataset("train", 16)
    with pytest.raises(ValueError, match=r"batch_size .*\b0$"):
        training_batches(dataset, 0)
    with pytest.raises(ValueError, match=r"start .*-1$"):
        training_batches(dataset, 1, start=-1)
    with pytest.raises(ValueError, match=r"workers .*-2$"):
        validation_batches(dataset, 1, workers=-2)


@pytest.mark.parametrize("use", ["batches = training_batches(data, 4, workers=1); next(batches)", ALL_VALIDATION])
def test_loaders_do_not_keep_python_from_ending(use: str) -> None:
    """With batches left, or with workers that wait for another pass."""
    code = (
        "from regvq_fast.scenes import ScenesDataset\n"
        "from regvq_fast.data import training_batches, validation_batches\n"
        f"data = ScenesDataset('train', 16, length=8)\n{use}"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (0, "")


def test_workers_end_when_their_parent_is_killed_though_their_batches_fill_the_pipe():
    """DataLoader's worker waits until they are sent, and would wait forever."""
    code = (
        "import os, signal, time\n"
        "from regvq_fast.data.loading import in_order\n"
        "batches = iter(in_order([bytes(10**6)] * 9, workers=1))\n"
        "next(batches)\n"
        "time.sleep(2)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    # The worker has the output, too: it is at its end when both are.
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (-signal.SIGKILL, "")


def test_samples_spread_over_sorted_images_are_of_every_class(tmp_path):
    for name in ("cow", "fox"):
        for k in range(8):
            write_flat(tmp_path / "val" / name / f"{k}.png", 10 * k)
        write_flat(tmp_path / "train" / name / "0.png", 0)
    images = build_dataset(tmp_path, split="val", image_size=8, fields=("label",))
    assert spread_samples(images, 4)["label"].tolist() == [0, 0, 1, 1]
    assert len(spread_samples(images, 99)["label"]) == 16


def test_workers_end_though_one_was_killed_with_a_lock():
    """As one is that looks at the event by which the loader asks its workers to end."""
    batches = training_batches(ScenesDataset("train", 16), 2, workers=1)
    next(batches)
    inner = batches._batches._batches
    (worker,) = inner._workers
    assert inner._workers_done_event._cond._lock.acquire(timeout=10), "the lock is never released"
    closing = threading.Thread(target=batches.close, daemon=True)
    closing.start()
    closing.join(20)
    assert not closing.is_alive()
    assert not worker.is_alive()


def test_a_worker_that_ends_is_an_error_of_the_wait_for_its_batch_alone():
    batches = training_batches(ScenesDataset("train", 16), 2, workers=1)
    next(batches)
    (worker,) = batches._batches._batches._workers
    os.kill(worker.pid, signal.SIGKILL)
    worker.join(20)
    for _ in range(20):  # DataLoader's own error would come here
        time.sleep(0.01)
    with pytest.raises(WorkersFailed, match=rf"worker 0 \(process {worker.pid}\) ended by SIGKILL; --workers 0"):
        take(batches, 100)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_killed_while_it_sends_a_batch_ends_the_wait_for_the_rest(workers, monkeypatch):
    """Another worker has the pipe open, too, and waits for its turn to write."""
    monkeypatch.setattr("regvq_fast.data.workers._LOOK_SECONDS", 0.2)
    batches = iter(in_order([bytes(10**6)] * 9, workers=workers))
    time.sleep(2)  # the first batch is larger than the pipe
    worker = batches._batches._workers[0]
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(WorkersFailed, match=rf"worker 0 \(process {worker.pid}\) ended by SIGKILL; --workers 0"):
        list(batches)
    assert not any(process.is_alive() for process in batches._batches._workers)


@pytest.mark.parametrize(("number", "fate"), [(signal.SIGKILL, "ended by SIGKILL"), (signal.SIGSTOP, "is stopped")])
def test_a_worker_that_is_lost_between_two_passes_ends_the_wait_for_the_second(number, fate, monkeypatch):
    monkeypatch.setattr("regvq_fast.data.workers._LOOK_SECONDS", 0.2)
    monkeypatch.setattr("regvq_fast.data.workers.PATIENCE_SECONDS", 1.0)
    loader = validation_batches(ScenesDataset("val", 16, length=7), 3, workers=2)
    list(loader)
    lost = loader._iterator._workers[1]
    os.kill(lost.pid, number)
    with pytest.raises(WorkersFailed, match=rf"worker 1 \(process {lost.pid}\) {fate}"):
        list(loader)


def test_batches_with_pinned_memory_end_in_the_middle_of_sending_one(monkeypatch, capfd):
    """PyTorch's thread that pins would wait for the rest."""
    for name, value in {"is_available": True, "current_device_index": 0, "set_device_index": None}.items():
        monkeypatch.setattr(torch.accelerator, name, lambda *_, value=value: value)
    options = {"collate_fn": list, "worker_init_fn": start_worker, "pin_memory": True}
    for _ in range(3):
        batches = iter(WorkerLoader([bytes(10**7)] * 9, num_workers=2, **options))
        next(batches)
        closing = threading.Thread(target=batches.close, daemon=True)
        closing.start()
        closing.join(20)
        assert not closing.is_alive()
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("passes", [1, 0])
def test_workers_end_at_once_with_batches_that_are_found_by_garbage_collection(passes):
    """There the queues are at their end before the workers get their message."""
    loader = validation_batches(ScenesDataset("val", 16, length=70), 3, workers=1)
    batches = list(loader) if passes else iter(loader)
    worker = loader._iterator._workers[0].pid
    cycle = [loader, batches]
    cycle.append(cycle)
    del loader, batches, cycle
    start = time.monotonic()
    gc.collect()
    assert time.monotonic() - start < 4
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)


def test_a_fork_that_forgets_batches_leaves_their_workers_alone():
    """As another loader's worker does by garbage collection."""
    batches = training_batches(ScenesDataset("train", 16), 2, workers=1)._batches
    fork = multiprocessing.get_context("fork").Process(target=batches._batches.__del__)
    fork.start()
    fork.join(20)
    assert fork.exitcode == 0
    assert len(take(batches, 20)) == 20


def test_without_workers_a_thread_loads_and_ends_with_the_batches():
    batches = training_batches(AboutTheProcess(), 1)
    assert int(next(batches)["image"][0, 0]) == os.getpid()
    thread = batches._batches._thread
    assert thread.is_alive()
    del batches
    thread.join(20)
    assert not thread.is_alive()
