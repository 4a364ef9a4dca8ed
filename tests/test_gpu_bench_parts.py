"""What the benchmarks of ops and of whole steps share: processes in their time, parts of a step, clocks, cases."""

import json
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import bench_assign_codes
import bench_step
import bench_vector_quantize
import bench_weighted_info_nce
import gpu_cases
import gpu_info_nce
import gpu_parts
import gpu_report
import machine
import measuring
import pytest
import records
import step_parts
import torch
from gpu_cases import Case, WrongResultError
from gpu_info_nce import InfoNceCase

from regvq_fast.config import override

# ------------------------------------------------------------------------------------------------- processes


@pytest.mark.parametrize(
    ("output", "code", "status", "counts"),
    [
        (".. [100%]\n2 passed, 1 skipped in 3.20s", 0, "passed", {"passed": 2, "skipped": 1}),
        ("F.\nFAILED a::b - no\n1 failed, 1 passed in 72.1s (0:01:12)", 1, "failed", {"failed": 1, "passed": 1}),
        ("..s. [ 50%]\n..", None, "stopped at the time limit", {"passed": 5, "failed": 0, "skipped": 1}),
        ("..F. [ 50%]\nE", None, "failed", {"passed": 3, "failed": 2, "skipped": 0}),
        ("No module named pytest", 1, "failed", {}),
    ],
)
def test_counts_of_the_tests(output, code, status, counts):
    result = gpu_parts.read_tests(output, code)
    assert (result["status"], result["counts"]) == (status, counts)
    assert bool(result["failures"]) == (code == 1)


def test_a_process_is_stopped_at_its_limit():
    output, code, seconds = gpu_parts.run_pytest(["--version"], 60.0)
    assert (code, "pytest" in output) == (0, True)
    assert gpu_parts.run_pytest(["--version"], 0.01)[1] is None
    assert seconds < 60


@pytest.mark.parametrize(
    ("code", "output", "status", "told"),
    [
        (0, "SKIPPED [1] a.py:1: taming is not installed", "done", ["SKIPPED [1] a.py:1: taming is not installed"]),
        (None, "..", "stopped at the time limit", []),
        (1, "FAILED a.py::b - dx is off", "failed", ["FAILED a.py::b - dx is off"]),
        (4, "usage\nno such file", "failed", ["usage", "no such file"]),
    ],
)
def test_benchmarks_that_were_done_are_kept_whatever_comes(monkeypatch, code, output, status, told):
    """The last line is half written."""
    entry = {"group": "step", "stats": {"median": 1.5}}

    def run_pytest(arguments, limit):
        with open(arguments[arguments.index("--lines") + 1], "w") as lines:
            lines.write(json.dumps(entry) + "\n" + '{"group": "st')
        return output, code, 7.0

    monkeypatch.setattr(gpu_parts, "run_pytest", run_pytest)
    entries, part = gpu_parts.run_benchmarks("bench/bench_step.py", 60.0)
    assert entries == [entry]
    assert part == {"status": status, "seconds": 7.0, "measured": 1, "told": told}
    report = {"tests": None, "cases": [], "parts": {"bench/bench_step.py": part}, "not_measured": {}}
    assert bool(gpu_report.problems(report)) == (status == "failed")


def test_a_benchmark_that_is_stuck_says_where():
    output = """Timeout (0:00:40)!
Thread 0x00007f (most recent call first):
  File "/usr/lib/python3.12/threading.py", line 327 in wait
Thread 0x00007e (most recent call first):
  File "/site/torch/_inductor/async_compile.py", line 9 in wait
  File "/home/me/regvq_fast/bench/bench_step.py", line 80 in make_trainer
"""
    stack = ["_inductor/async_compile.py:9 wait", "bench/bench_step.py:80 make_trainer"]
    assert gpu_parts.read_part(output, None, 85.0)["told"] == stack
    assert gpu_parts.read_part(output, 0, 85.0)["told"] == []


@pytest.mark.parametrize("ready", [True, False])
def test_tiles_that_were_searched_are_kept(monkeypatch, ready):
    def run_python(arguments, limit):
        assert arguments[:2] == [gpu_parts.TILES, "--out"]
        if ready:
            Path(arguments[2]).write_text('{"searches": [{"kernel": "a"}]}')
        return "", None, 7.0

    monkeypatch.setattr(gpu_parts, "run_python", run_python)
    found, part = gpu_parts.search_tiles(60.0)
    assert found == [{"kernel": "a"}] * ready
    assert (part["status"], part["measured"]) == ("stopped at the time limit", int(ready))


def test_steps_are_compiled_while_the_tests_run(monkeypatch):
    both, calls = threading.Barrier(2, timeout=30), {}

    def run_pytest(arguments, limit, **variables):
        both.wait()
        calls[arguments[0]] = arguments
        return ".. [100%]\n2 passed in 3.20s", 0, 7.0

    monkeypatch.setattr(gpu_parts, "run_pytest", run_pytest)
    monkeypatch.setattr(gpu_parts.os, "cpu_count", lambda: 16)
    tests, compilation = gpu_parts.run_tests(60.0)
    assert (tests["status"], compilation["status"]) == ("passed", "done")
    assert calls["tests/ops"][-2:] == calls[gpu_parts.STEPS[0]][-2:] == ["-n", "8"]


def test_a_step_that_runs_out_of_memory_is_skipped_by_name(tmp_path):
    script = tmp_path / "test_step.py"
    script.write_text("""
import torch

def test_step(measure_step):
    def make():
        raise torch.OutOfMemoryError("8 GiB")

    measure_step("steps", make, {"competitor": "taming"}, "cpu")
""")
    arguments = [str(script), "-p", "conftest", "-rs", f"--rootdir={tmp_path}"]
    output, code, _ = gpu_parts.run_pytest(arguments, 120.0, PYTHONPATH=f"{machine.ROOT / 'bench'}:{machine.ROOT}")
    assert code == 0
    assert "taming runs out of memory" in output


def test_every_script_has_something_that_is_compiled_before():
    arguments = [*gpu_parts.STEPS, "-k", gpu_parts.COMPILED, "--collect-only"]
    output, code, _ = gpu_parts.run_pytest(arguments, 120.0)
    assert code == 0
    assert all(f"{script}::" in output for script in gpu_parts.STEPS)
    assert "small" not in output


@pytest.mark.parametrize(("seconds", "mib", "met"), [(0.2, 6.0, True), (0.21, 6.1, False)])
def test_targets_of_the_training_step(seconds, mib, met):
    def entry(name, median, peak):
        info = {"op": "vqgan", "competitor": name, "peak_mib": peak}
        return {"extra_info": info, "stats": {"median": median}}

    steps = [entry("amp-compile", seconds, mib), entry("taming", 1.0, 10.0)]
    targets = {target["what"]: target["met"] for target in gpu_report.step_targets(steps)}
    assert targets == {
        "times as fast as taming's": met,
        "of taming's memory": met,
    }
    assert gpu_report.step_targets([]) == []


# ------------------------------------------------------------------------------------------------------- clocks


def test_a_part_within_another_one_counts_for_itself(monkeypatch):
    now = iter([0.0, 1.0, 4.0, 9.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    watch = step_parts.Stopwatch("cpu")
    with watch.part("rest"):
        watch.watched("encoder", lambda: None)()
    assert watch.seconds == {"rest": 1.0 + 5.0, "encoder": 3.0}


def test_the_parts_of_a_step_are_its_own():
    """Each part is called once and takes a millisecond; what is patched comes back."""

    def sleep(*arguments):
        time.sleep(1e-3)

    def module():
        return SimpleNamespace(forward=sleep)

    decoder = SimpleNamespace(conv_out=module())
    model = SimpleNamespace(encoder=module(), quantize=module(), decoder_features=sleep, decoder=decoder)
    recipe = SimpleNamespace(reconstruction_loss=module(), discriminator=module())
    networks, optimization = SimpleNamespace(model=model), SimpleNamespace(step=sleep)
    trainer = SimpleNamespace(networks=networks, recipe=recipe, optimization=optimization)
    value = torch.ones((), requires_grad=True)

    def step():
        model.encoder.forward()
        model.quantize.forward()
        model.decoder_features()
        decoder.conv_out.forward()
        recipe.reconstruction_loss.forward()
        (2 * value).backward()
        optimization.step()

    before = torch.autograd.backward
    parts = step_parts.parts_of_step(trainer, step, "cpu", repeats=3)
    names = ["encoder", "quantizer", "decoder", "perceptual and contrastive", "backward", "optimizers", "rest"]
    assert list(parts) == names
    assert min(parts[name] for name in names[:4]) >= 1
    assert parts["decoder"] >= 2
    assert torch.autograd.backward is before


def test_a_target_counts_until_the_device_has_done_the_step(monkeypatch):
    log = []
    monkeypatch.setattr(bench_step, "need", lambda *_: None)
    monkeypatch.setattr(bench_step, "make_run", lambda size, mode: lambda: log.append("step"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("synchronize"))
    assert bench_step.compare("paper", "taming").keys() == {"taming"}
    assert log[::2] == len(log) // 2 * ["step"]
    assert log[1::2] == len(log) // 2 * ["synchronize"]


@pytest.mark.parametrize(("name", "wrong"), [("l1", 0.6), ("loss", 0.8), ("grad_norm", 0.0)])
def test_a_compiled_step_with_other_numbers_reports_no_time(name, wrong):
    expected = {"l1": 0.5, "loss": 0.7, "grad_norm": 4.0, "lr": 1e-4}
    bench_step.check_compiled(expected | {"loss": 0.71, "grad_norm": 3.5, "lr": 0.0}, expected)
    with pytest.raises(AssertionError, match=name):
        bench_step.check_compiled(expected | {name: wrong}, expected)


def test_what_a_compiled_step_is_compared_with_changes_nothing(monkeypatch):
    """Its numbers are those of the step that follows, however often it is asked."""
    tiny = {"batch_size": 2, "image_size": 32, "ch": 32, "ch_mult": (1, 1), "perceptual_weight": 0.0}
    config = override(bench_step.SIZES["small"], **(bench_step.LIKE_FOR_LIKE | bench_step.REG_VQ | tiny))
    images = bench_step.make_images(config)
    before = bench_step.make_trainer(config, images).record()[0]
    monkeypatch.setattr(bench_step.Trainer, "step", lambda *_: None)
    trainer = bench_step.make_trainer(config, images)
    numbers = bench_step.plain_numbers(trainer, images)
    assert {"l1", "loss", "discriminator", "grad_norm", "grad_norm_discriminator"} <= numbers.keys()
    assert numbers == {name: before[name] for name in numbers}
    assert all(p.grad is None for module in trainer.networks.trained.values() for p in module.parameters())
    assert bench_step.plain_numbers(trainer, images) == numbers


def test_measured_seconds_are_replayed():
    clock = measuring.ReplayClock()
    run = clock.replayed([0.25, 0.5])
    times = [clock()]
    for _ in range(2):
        run()
        times.append(clock())
    assert times == [0.0, 0.25, 0.75]


def test_competitors_of_a_case_take_turns_in_the_suite(tmp_path):
    """And each reports what was measured of itself, or why nothing was."""
    (tmp_path / "fake.py").write_text("""
import peers
from gpu_cases import WrongResultError

class Case:
    op, part, dtype, name, products, flops, bytes = "op", "part", "float32", "case", 1, 10, 1

    def describe(self):
        return {}

CASE, order = Case(), []
make_inputs = truth_of = lambda *_: None

def make_absent():
    raise peers.SkippedError("c is not installed")

def examine(case, inputs, truth, name, run):
    run()
    if name == "d":
        raise WrongResultError("d is off")
    return {}

def competitors(case, inputs):
    def run(name):
        return lambda: order.append(name) or ()
    return {name: (lambda name=name: run(name)) for name in "abd"} | {"c": make_absent}
""")
    (tmp_path / "test_case.py").write_text("""
import fake

def pairs(device):
    return [(fake.CASE, name) for name in "abcd"]

def test_case(measure_case, case, competitor):
    measure_case(fake, case, competitor)
    assert "".join(fake.order).endswith("aabbaabb")
""")
    lines = tmp_path / "lines"
    arguments = [str(tmp_path), "-p", "conftest", "-rsf", f"--rootdir={tmp_path}", "--lines", str(lines)]
    path = f"{machine.ROOT / 'bench'}:{machine.ROOT}:{tmp_path}"
    output, code, _ = gpu_parts.run_pytest(arguments, 120.0, PYTHONPATH=path, CUDA_VISIBLE_DEVICES="")
    assert code == 1
    assert "1 failed, 2 passed, 1 skipped" in output
    assert "c is not installed" in output
    assert "d is off" in output
    entries = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [entry["extra_info"]["competitor"] for entry in entries] == ["a", "b"]
    assert all(entry["stats"]["rounds"] == 30 for entry in entries)


@pytest.mark.parametrize(("seconds", "rounds"), [(1e-4, 30), (0.1, 8), (10.0, 3), (0.0, 30)])
def test_rounds(seconds, rounds):
    assert measuring.rounds(seconds, 30) == rounds


# -------------------------------------------------------------------------------------------------------- cases


@pytest.mark.parametrize(
    "case",
    [
        Case("backward", 24, "float32", rows=96, width=8),
        Case("assign", 24, "float32", rows=96, width=8),
        Case("forward+backward", 24, "float32", rows=96, width=8, graph=True),
        InfoNceCase("backward", 48, 8, "float32", rows=96),
    ],
    ids=lambda case: case.name,
)
def test_everyone_who_is_named_competes(case):
    op = gpu_cases if isinstance(case, Case) else gpu_info_nce
    makers = op.competitors(case, op.make_inputs(case, "cpu"))
    assert tuple(makers) == op.names(case)


@pytest.mark.parametrize("name", ["ours", "eager", "nearest"])
def test_a_backward_alone_runs_again_and_again(name):
    case = Case("backward", 24, "float32", rows=96, width=8)
    inputs = gpu_cases.make_inputs(case, "cpu")
    run = gpu_cases.competitors(case, inputs)[name]()
    first, second = run(), run()
    assert [gradient.shape for gradient in first] == [(96, 8), (24, 8)]
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("op", "case"),
    [
        (gpu_cases, Case("backward", 24, "float32", rows=96, width=8)),
        (gpu_info_nce, InfoNceCase("backward", 48, 8, "float32", rows=96)),
    ],
)
def test_the_gate_of_a_backward_alone(op, case):
    inputs = op.make_inputs(case, "cpu")
    truth = op.truth_of(case, inputs)
    gradients = op.competitors(case, inputs)["ours"]()()
    op.examine(case, inputs, truth, "ours", lambda: gradients)
    wrong = tuple(1.001 * gradient for gradient in gradients)
    with pytest.raises(WrongResultError, match=r"is off by 0\.001"):
        op.examine(case, inputs, truth, "ours", lambda: wrong)


@pytest.mark.parametrize("bench", [bench_assign_codes, bench_vector_quantize, bench_weighted_info_nce])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_cases_of_pytest_benchmark(bench, device):
    """Names tell cases apart, and on a CPU few of them are compiled, the largest ones."""
    pairs = bench.pairs(device)
    assert len({(case.name, name) for case, name in pairs}) == len(pairs) == len(set(pairs))
    assert {case.dtype for case, _ in pairs} >= {"float32", "bfloat16"}
    cases, compiled = {case for case, _ in pairs}, {case for case, name in pairs if name == "compiled"}
    largest = {
        part: max(case.flops for case in cases if case.part == part)
        for part in ("assign", "forward+backward")
        if any(case.part == part for case in cases)
    }
    assert len(compiled) <= 2 if device == "cpu" else compiled == cases
    assert all(any(case.flops == flops for case in compiled) for flops in largest.values())


def test_the_sweeps_of_vector_quantize():
    for device in ("cpu", "cuda"):
        found = bench_vector_quantize.cases(device)
        assert {case.part for case in found} == {"forward", "backward", "forward+backward"}
        assert {512, 65536} <= {case.codes for case in found}
        assert {8, 16, 32, 64, 256, 512} <= {case.width for case in found}
        assert {"trained-like", "random"} == {case.latents for case in found}
        assert {"soft", "hard"} == {case.codebook_grad for case in found}
        assert {case.dtype for case in found} == {"float32", "float16", "bfloat16"}


def test_what_sets_a_case_apart_is_in_its_name_and_its_record():
    case = Case(
        "forward+backward", 24, "float32", masked=False, graph=True, latents="trained-like", codebook_grad="hard"
    )
    part = "forward+backward, CUDA graph, no noise, trained-like, hard codebook gradient"
    assert case.name == f"{part}, N=24, float32"
    assert records.part_of({"part": case.part} | case.describe()) == part
    assert (case.products, Case("backward", 24, "float32").products) == (5, 5)
