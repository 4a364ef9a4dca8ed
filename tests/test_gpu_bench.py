"""``bench/gpu.py`` as far as a CPU can tell: its gate, how it measures, its report and exit codes."""

import json
import math
import os
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import gpu
import gpu_cases
import gpu_info_nce
import gpu_report
import machine
import measuring
import peers
import pytest
import torch
from gpu_cases import Case
from gpu_info_nce import InfoNceCase

from regvq_fast import nvml
from regvq_fast.ops import vector_quantize

ROOT = Path(__file__).resolve().parents[1]
STEP = Case("forward+backward", 24, "float32", rows=96, width=8)
ASSIGN = Case("assign", 24, "float32", rows=96, width=8)
CONTRAST = InfoNceCase("forward+backward", 48, 8, "float32", rows=96)


class FakeMeter:
    """Runs what it is given and says what it was told, one millisecond more at each call."""

    def __init__(self) -> None:
        self.calls = 0

    def time(self, run: measuring.Run) -> measuring.Sample:
        run()
        self.calls += 1
        return measuring.Sample(1e-3 * self.calls, 5e-3)

    def extra_mib(self, run: peers.TensorRun) -> float:
        run()
        return 7.0


# ------------------------------------------------------------------------------------------------------- measurements


def test_a_device_measurement_is_cold_and_hides_the_launches(monkeypatch):
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("event")

        def elapsed_time(self, end):
            return 2.5

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append("sleep"))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: SimpleNamespace(L2_cache_size=1 << 20))
    meter = measuring.DeviceMeter(device="cpu")
    assert meter.flushed_mib >= 256
    meter._flush = SimpleNamespace(zero_=lambda: log.append("flush"))  # type: ignore[assignment]
    sample = meter.time(lambda: log.append("run"))
    assert log == "synchronize run synchronize flush sleep event run event synchronize".split()
    assert sample.device == 2.5e-3
    assert 0 <= sample.host < 1


def test_extra_memory_is_the_peak_less_what_was_there_and_what_is_returned(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 100 * 2**20)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 164 * 2**20)
    output = torch.zeros(2**22)  # 16 MiB
    meter = object.__new__(measuring.DeviceMeter)
    assert meter.extra_mib(lambda: (output, output.view(2, -1))) == 48


def test_competitors_take_turns_until_the_time_is_up(monkeypatch):
    order = []
    runs = {name: lambda name=name: order.append(name) for name in "ab"}
    readings = measuring.take_turns(runs, measuring.wall_clock, 3)
    assert order == list("ababab")
    assert [len(values) for values in readings.values()] == [3, 3]
    assert len(measuring.take_turns(runs, measuring.wall_clock, 100, limit=-1)["a"]) == measuring.LEAST_REPEATS


def test_a_measured_case_holds_every_competitor_and_what_became_of_it():
    inputs = gpu_cases.make_inputs(ASSIGN, "cpu")

    def absent():
        raise peers.SkippedError("peer is not installed: pip install peer")

    def too_large():
        raise torch.OutOfMemoryError("8 GiB")

    def broken():
        return lambda: 1 / 0

    wrong = (gpu_cases.truth_of(ASSIGN, inputs).indices + 1) % 24
    makers = gpu_cases.competitors(ASSIGN, inputs)
    makers = {name: makers[name] for name in ("fused", "eager", "matmul")}
    makers |= {"chunked": lambda: lambda: (wrong,), "absent": absent, "too large": too_large, "broken": broken}
    entry = gpu.measure_case(ASSIGN, inputs, makers, FakeMeter(), repeats=3)
    results = entry["results"]
    assert {name: result["status"] for name, result in results.items()} == {
        "fused": "ok",
        "eager": "ok",
        "matmul": "ok",
        "chunked": "wrong",
        "absent": "skipped",
        "too large": "out of memory",
        "broken": "failed",
    }
    assert results["absent"]["reason"] == "peer is not installed: pip install peer"
    assert results["broken"]["reason"] == "ZeroDivisionError: division by zero"
    # Turns of three: 1, 4, 7 ms, then 2, 5, 8, then 3, 6, 9.
    assert [results[name]["ms"] for name in ("fused", "eager", "matmul")] == [4, 5, 6]
    assert results["fused"]["host_ms"] == 5
    assert results["fused"]["extra_mib"] == 7
    assert results["eager"]["agreement"] == 1
    assert results["fused"]["tflops"] == pytest.approx(2 * 96 * 24 * 8 / 4e-3 / 1e12)
    assert "ms" not in results["chunked"]
    assert not {"REGVQ_SCHEDULE"} & os.environ.keys()
    json.dumps(entry)


def test_a_competitor_that_runs_out_of_memory_beside_the_others_has_no_time():
    inputs = gpu_cases.make_inputs(ASSIGN, "cpu")
    calls = []

    def make():
        def run():
            calls.append(1)
            if len(calls) == 5:
                raise torch.OutOfMemoryError("8 GiB")
            return (torch.zeros(96, dtype=torch.int64),)

        return run

    makers = gpu_cases.competitors(ASSIGN, inputs)
    entry = gpu.measure_case(ASSIGN, inputs, {"fused": makers["fused"], "eager": make}, FakeMeter(), repeats=4)
    assert entry["results"]["eager"]["status"] == "out of memory"
    assert "ms" not in entry["results"]["eager"]
    assert entry["results"]["fused"]["repeats"] == 4


def test_an_outcome_keeps_no_tensors_of_what_failed():
    held = []

    def make():
        tensor = torch.zeros(1)
        held.append(weakref.ref(tensor))
        raise torch.OutOfMemoryError("8 GiB")

    outcomes = measuring.measure_side_by_side({"a": make}, lambda name, run: {}, measuring.wall_clock, 3, 1.0)
    assert isinstance(outcomes["a"], torch.OutOfMemoryError)
    assert outcomes["a"].__traceback__ is not None  # it still says where
    assert held[0]() is None


def test_plain_pytorch_computes_what_the_op_computes():
    """Without noise the baseline's codes and, with the same codebook gradient, its gradients are the op's."""
    case = Case("forward+backward", 24, "float64", masked=False, rows=96, width=8)
    inputs = gpu_cases.make_inputs(case, "cpu")
    indices, quantized, posterior, *gradients = gpu_cases.run_plain(case, inputs, peers.plain_quantize)
    output = vector_quantize(inputs.x, inputs.codebook, scale=inputs.scale, codebook_grad="hard")
    expected = gpu_cases.gradients_of(case, inputs, output.quantized, output.posterior)
    assert torch.equal(indices, output.indices)
    torch.testing.assert_close(quantized, output.quantized.detach())
    torch.testing.assert_close(posterior, output.posterior.detach())
    for ours, plain in zip(expected, gradients, strict=True):
        torch.testing.assert_close(plain, ours, rtol=1e-9, atol=1e-9)


def test_plain_noise_is_gumbel_noise():
    """Of 16 codes one has a logit of 0 and the others -2: it comes as often as softmax says (4 standard deviations)."""
    torch.manual_seed(0)
    rows = 4000
    codebook = torch.full((16, 1), 2**0.5)
    codebook[0] = 0
    mask, tau = torch.ones(rows, dtype=torch.bool), torch.tensor(0.9)
    mask[::2] = False
    output = peers.plain_quantize(torch.zeros(rows, 1), codebook, mask, mask.nonzero().squeeze(1), tau, 1.0)
    assert not output.indices[::2].any()
    share = float((output.indices[1::2] == 0).float().mean())
    expected = 1 / (1 + 15 * math.exp(-2))
    assert abs(share - expected) < 4 * (expected * (1 - expected) / (rows / 2)) ** 0.5


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_kmeans", None)
    monkeypatch.setitem(sys.modules, "vector_quantize_pytorch", None)
    x, codebook = torch.zeros(3, 2), torch.zeros(4, 2)
    with pytest.raises(peers.SkippedError, match="pip install flash-kmeans"):
        peers.flash_kmeans(x, codebook)
    with pytest.raises(peers.SkippedError, match="pip install vector-quantize-pytorch"):
        peers.lucidrains(x, codebook, None, gumbel=True)


# -------------------------------------------------------------------------------------------------- cases, machine


def test_the_order_of_the_cases():
    """Targets of vector quantization, of InfoNCE, then the rest."""
    targets, others = gpu.target_cases("bfloat16"), gpu.other_cases("bfloat16")
    assert [type(case) for case in targets] == [*5 * [Case], *7 * [InfoNceCase]]
    cases = targets + others
    assert len(set(cases)) == len(cases) == len({case.name for case in cases})
    cases = [case for case in cases if isinstance(case, Case)]
    plain = [case for case in cases if not case.graph and case.masked and case.width == 256]
    parts = {(case.part, case.codes) for case in plain if case.dtype == "bfloat16"}
    assert parts == {(part, codes) for part in gpu_cases.PARTS for codes in (512, 1024, 4096, 8192, 16384, 65536)}
    assert {case.codes for case in cases if case.dtype == "float32"} == {8192}
    assert {case.width for case in cases} == {64, 256, 512}
    assert {case.dtype for case in gpu.target_cases("float16") + gpu.other_cases("float16")} == {"float16", "float32"}
    assert Case("forward+backward", 8192, "bfloat16").flops == 6 * 2 * 10240 * 8192 * 256


def test_throttle_reasons_by_name():
    assert nvml.throttle_reasons(0) == []
    assert nvml.throttle_reasons(0x4 | 0x40) == ["power cap", "thermal, hardware"]


def test_without_nvml_the_state_is_null_and_says_why(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    driver, read, problem = nvml.gpu_state()
    assert driver is None
    assert read() is None
    assert "pip install nvidia-ml-py" in problem


def test_the_commit_is_recorded_where_there_is_one():
    software = machine.describe_software()
    assert software["torch"] == torch.__version__
    assert software["commit"] is None or len(software["commit"]) == 40


# --------------------------------------------------------------------------------------------------------------- main


def test_without_cuda_it_says_so_and_exits_with_2():
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, ROOT / "bench" / "gpu.py"], capture_output=True, text=True, env=environment, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr.splitlines()) == (2, "", [gpu.NO_CUDA])


@pytest.fixture
def pretend_gpu(monkeypatch, tmp_path):
    """Runs main as on a GPU, on four small cases, with two competitors and without tests; returns code and report."""
    pytest.importorskip("triton")  # it knows the schedules
    small = [STEP, ASSIGN, Case("forward", 24, "float32", rows=96, width=8), CONTRAST]

    def on_cpu(op):
        make_inputs, competitors, names = op.make_inputs, op.competitors, ("fused", "eager", "matmul")
        monkeypatch.setattr(op, "make_inputs", lambda case, device: make_inputs(case, "cpu"))
        monkeypatch.setattr(
            op, "competitors", lambda case, inputs: {name: competitors(case, inputs)[name] for name in names}
        )

    on_cpu(gpu_cases)
    on_cpu(gpu_info_nce)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(machine, "describe_gpu", lambda: {"gpu": "NVIDIA Test"})
    monkeypatch.setattr(nvml, "gpu_state", lambda: ("1.2", lambda: {"sm_mhz": 1980}, None))
    monkeypatch.setattr(measuring, "DeviceMeter", lambda: SimpleNamespace(**_members(FakeMeter()), flushed_mib=256))
    monkeypatch.setattr(gpu, "square_product_tflops", lambda meter, dtype: 700.0)
    monkeypatch.setattr(gpu, "copy_tb_per_s", lambda meter: 4.0)
    monkeypatch.setattr(gpu, "target_cases", lambda half: small)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # main takes both out of the environment
    monkeypatch.setenv("REGVQ_SCHEDULE", "chunked")
    path = tmp_path / "new" / "results.json"

    def run():
        return gpu.main(["--quick", "--out", str(path)]), json.loads(path.read_text())

    return run


def _members(meter):
    return {"time": meter.time, "extra_mib": meter.extra_mib}


def test_the_report_of_a_whole_run(pretend_gpu, capsys):
    code, report = pretend_gpu()
    assert code == 0
    assert [entry["case"] for entry in report["cases"]] == [
        "forward+backward, M=96, N=24, D=8, float32",
        "assign, M=96, N=24, D=8, float32",
        "forward, M=96, N=24, D=8, float32",
        "InfoNCE forward+backward, B=2, L=48, C=8, float32",
    ]
    assert [entry["op"] for entry in report["cases"]] == [*3 * ["vector_quantize"], "weighted_info_nce"]
    assert {"command", "date", "machine", "packages", "method", "tests", "targets", "seconds"} <= report.keys()
    assert report["method"]["default_schedule"] == "fused"
    assert report["machine"]["driver"] == "1.2"
    assert report["machine"]["torch"] == torch.__version__
    assert report["cases"][0]["state"] == {"sm_mhz": 1980}
    assert report["cases"][0]["results"]["fused"]["status"] == "ok"
    assert report["packages"].keys() == set(peers.PACKAGES)
    assert capsys.readouterr().out.endswith("tests/ops: not run\n")


def test_a_wrong_op_makes_the_run_fail(pretend_gpu, monkeypatch, capsys):
    run_ours = gpu_cases.run_ours

    def wrong(case, inputs, impl="auto"):
        results = run_ours(case, inputs, impl)
        if impl == "eager" or case.part == "assign":
            return results
        return (*results[:2], (results[2] + 1) % case.codes, *results[3:])

    monkeypatch.setattr(gpu_cases, "run_ours", wrong)
    code, report = pretend_gpu()
    assert code == 1
    assert [entry["results"]["fused"]["status"] for entry in report["cases"]] == ["wrong", "ok", "wrong", "ok"]
    assert "PROBLEM: forward, M=96, N=24, D=8, float32, fused wrong: " in capsys.readouterr().out


def test_no_case_begins_after_the_time_limit(pretend_gpu, monkeypatch):
    monkeypatch.setattr(gpu, "LIMIT", -1)
    code, report = pretend_gpu()
    assert code == 0
    assert report["cases"] == []
    assert set(report["not_measured"].values()) == {gpu_report.OUT_OF_TIME}
    assert "training step, amp and compile" in {target["case"] for target in report["targets"]}
    assert {target["met"] for target in report["targets"]} == {None}


def test_a_case_that_cannot_be_set_up_is_named_and_the_others_go_on(pretend_gpu, monkeypatch):
    truth_of = gpu_cases.truth_of

    def failing(case, inputs):
        if case.part == "assign":
            raise torch.OutOfMemoryError("8 GiB")
        return truth_of(case, inputs)

    monkeypatch.setattr(gpu_cases, "truth_of", failing)
    code, report = pretend_gpu()
    assert code == 1
    assert len(report["cases"]) == 3
    assert report["not_measured"] == {"assign, M=96, N=24, D=8, float32": "OutOfMemoryError: 8 GiB"}
