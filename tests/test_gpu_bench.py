"""``bench/gpu.py`` as far as a CPU can tell: its gate, how it measures, its report and exit codes."""

import itertools
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
from regvq_fast.ops.noise import gumbel_noise

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
    makers = {name: makers[name] for name in ("eager", "matmul")}
    makers |= {"ours": lambda: lambda: (wrong,), "absent": absent, "too large": too_large, "broken": broken}
    entry = gpu.measure_case(ASSIGN, inputs, makers, FakeMeter(), repeats=3)
    results = entry["results"]
    assert {name: result["status"] for name, result in results.items()} == {
        "eager": "ok",
        "matmul": "ok",
        "ours": "wrong",
        "absent": "skipped",
        "too large": "out of memory",
        "broken": "failed",
    }
    assert results["absent"]["reason"] == "peer is not installed: pip install peer"
    assert results["broken"]["reason"] == "ZeroDivisionError: division by zero"
    # Turns of two: 1, 3, 5 ms, then 2, 4, 6.
    assert [results[name]["ms"] for name in ("eager", "matmul")] == [3, 4]
    assert results["eager"]["host_ms"] == 5
    assert results["eager"]["extra_mib"] == 7
    assert results["eager"]["agreement"] == 1
    assert results["eager"]["tflops"] == pytest.approx(2 * 96 * 24 * 8 / 3e-3 / 1e12)
    assert "ms" not in results["ours"]
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
    entry = gpu.measure_case(ASSIGN, inputs, {"ours": makers["ours"], "eager": make}, FakeMeter(), repeats=4)
    assert entry["results"]["eager"]["status"] == "out of memory"
    assert "ms" not in entry["results"]["eager"]
    assert entry["results"]["ours"]["repeats"] == 4


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


@pytest.mark.parametrize("codebook_grad", ["soft", "hard"])
def test_plain_pytorch_computes_what_the_op_computes(codebook_grad):
    """Without noise the baseline's codes are the op's, and its gradients those of the same codebook gradient."""
    case = Case("forward+backward", 24, "float64", masked=False, rows=96, width=8, codebook_grad=codebook_grad)
    inputs = gpu_cases.make_inputs(case, "cpu")
    indices, quantized, posterior, *gradients = gpu_cases.run_plain(case, inputs, peers.plain_quantize)
    output = vector_quantize(inputs.x, inputs.codebook, scale=inputs.scale, codebook_grad=codebook_grad)
    expected = gpu_cases.gradients_of(case, inputs, output.quantized, output.posterior)
    assert torch.equal(indices, output.indices)
    torch.testing.assert_close(quantized, output.quantized.detach())
    torch.testing.assert_close(posterior, output.posterior.detach())
    for ours, plain in zip(expected, gradients, strict=True):
        torch.testing.assert_close(plain, ours, rtol=1e-9, atol=1e-9)


def test_plain_gradients_under_noise_are_those_of_its_softmax(monkeypatch):
    """By finite differences in fp64, with the same noise each time: temperatures and noise stand where they should."""
    case = Case("forward+backward", 6, "float64", rows=5, width=3)
    inputs = gpu_cases.make_inputs(case, "cpu")
    mask = torch.tensor([True, False, True, True, False])
    noise = -torch.rand(3, 6, dtype=torch.float64).log().neg().log()
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda self: self.copy_((-noise).exp()))

    def soft(x, codebook):
        output = peers.plain_quantize(x, codebook, mask, mask.nonzero().squeeze(1), inputs.tau, inputs.scale, "soft")
        return output.quantized, output.posterior

    def literal(x, codebook):
        full = torch.zeros(5, 6, dtype=torch.float64).index_copy(0, mask.nonzero().squeeze(1), noise)
        scores = -inputs.scale * (x.unsqueeze(1) - codebook).square().sum(2) + full
        p = (scores / torch.where(mask, inputs.tau, 1.0).unsqueeze(1)).softmax(1)
        return p @ codebook, p.mean(0, keepdim=True)

    leaves = (inputs.x, inputs.codebook)
    upstream = (inputs.grad_quantized, inputs.grad_posterior.double())
    for found, expected in zip(
        *(torch.autograd.grad(run(*leaves), leaves, upstream) for run in (soft, literal)), strict=True
    ):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("codes", [1024, 8192])
@pytest.mark.parametrize("width", [8, 256])
def test_trained_like_latents_have_the_softmax_of_trained_models(codes, width):
    case = Case("forward", codes, "bfloat16", rows=2048, width=width, latents="trained-like")
    inputs = gpu_cases.make_inputs(case, "cpu")
    x, codebook = inputs.x.detach().float(), inputs.codebook.detach().float()
    log_p = (-inputs.scale * torch.cdist(x, codebook).square()).log_softmax(1)
    entropy = float(-(log_p.exp() * log_p).sum(1).mean())
    largest = float(log_p.exp().amax(1).mean())
    noisy = log_p + gumbel_noise(inputs.seed, torch.arange(2048), codes)
    perturbed = float((noisy.argmax(1) != log_p.argmax(1)).float().mean())
    assert (entropy, largest, perturbed) == (
        pytest.approx(2.1, abs=0.15),
        *(pytest.approx(p, abs=0.03) for p in (0.4, 0.6)),
    )
    assert codebook.square().mean() == pytest.approx(1, abs=0.15)


def test_plain_noise_is_gumbel_noise():
    """Of 16 codes one has a logit of 0 and the others -2: it comes as often as softmax says (4 standard deviations)."""
    torch.manual_seed(0)
    rows = 4000
    codebook = torch.full((16, 1), 2**0.5)
    codebook[0] = 0
    mask, tau = torch.ones(rows, dtype=torch.bool), torch.tensor(0.9)
    mask[::2] = False
    output = peers.plain_quantize(torch.zeros(rows, 1), codebook, mask, mask.nonzero().squeeze(1), tau, 1.0, "soft")
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
    """Small and usual sizes in both types, then assignments and InfoNCE, then large ones; no name twice."""
    first, others = gpu.first_cases("bfloat16"), gpu.other_cases("bfloat16")
    cases = first + others
    assert len(set(cases)) == len(cases) == len({case.name for case in cases})
    usual = [case for case in first if not case.graph and case.latents == "random" and case.codebook_grad == "soft"]
    parts, types = ("forward+backward", "forward"), ("bfloat16", "float32")
    sizes = itertools.product(parts, (1024, 8192), types, (8, 32, 64, 256))
    assert {(case.part, case.codes, case.dtype, case.width) for case in usual} == set(sizes)
    assert {case.latents for case in first} == {"random", "trained-like"}
    assert {case.codebook_grad for case in first} == {"soft", "hard"}
    large = next(k for k, case in enumerate(others) if isinstance(case, Case) and case.codes >= 65536)
    before, after = others[:large], others[large:]
    assert {case.width for case in before if isinstance(case, Case)} >= {16, 64, 256}
    assert {type(case) for case in after} == {Case}
    assert {65536, 262144} <= {case.codes for case in after}
    assert {case.dtype for case in gpu.first_cases("float16") + gpu.other_cases("float16")} == {"float16", "float32"}
    assert Case("forward+backward", 8192, "bfloat16").flops == 6 * 2 * 10240 * 8192 * 256


def test_packages_take_part_at_one_width():
    names = {}
    for width in (64, 256):
        case = Case("forward+backward", 24, "float32", rows=96, width=width)
        names[width] = set(gpu.competitors(case, gpu_cases.make_inputs(case, "cpu")))
    assert names[64] == {"matmul", "ours", "eager", "compiled"}
    assert names[256] == set(gpu_cases.names(case))


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
    """Runs main as on a GPU, on four small cases, with three competitors; returns code and report."""
    small = [STEP, ASSIGN, Case("forward", 24, "float32", rows=96, width=8), CONTRAST]

    def on_cpu(op):
        make_inputs, competitors, names = op.make_inputs, op.competitors, ("ours", "eager", "matmul", "compiled")
        monkeypatch.setattr(op, "make_inputs", lambda case, device: make_inputs(case, "cpu"))
        monkeypatch.setattr(
            op,
            "competitors",
            lambda case, inputs: {name: competitors(case, inputs)[name.replace("compiled", "eager")] for name in names},
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
    monkeypatch.setattr(gpu, "first_cases", lambda half: small)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # main takes both out of the environment
    monkeypatch.setenv("REGVQ_SCHEDULE", "chunked")
    path = tmp_path / "new" / "results.json"

    def run(*flags):
        return gpu.main([*(flags or ["--quick"]), "--out", str(path)]), json.loads(path.read_text())

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
    assert report["machine"]["driver"] == "1.2"
    assert report["machine"]["torch"] == torch.__version__
    assert report["cases"][0]["state"] == {"sm_mhz": 1980}
    assert report["cases"][0]["results"]["ours"]["status"] == "ok"
    assert report["packages"].keys() == set(peers.PACKAGES)
    assert capsys.readouterr().out.endswith("tests/ops: not run\n")


def test_everything_runs_in_its_order(pretend_gpu, monkeypatch):
    order = []
    rest = Case("assign", 32, "float32", rows=96, width=8)
    measure_case = gpu.measure_case
    monkeypatch.setattr(gpu, "measure_case", lambda case, *more: order.append(case.name) or measure_case(case, *more))
    monkeypatch.setattr(gpu, "other_cases", lambda half: [rest])
    passed = {"status": "passed", "counts": {}}, {"status": "done", "told": []}
    done = {"status": "done", "seconds": 1.0, "told": [], "measured": 0}
    parts = gpu.gpu_parts
    monkeypatch.setattr(parts, "run_tests", lambda limit: order.append("tests") or passed)
    monkeypatch.setattr(parts, "run_benchmarks", lambda script, limit: order.append(script) or ([], done))
    monkeypatch.setattr(parts, "search_tiles", lambda limit: order.append(parts.TILES) or ([{"kernel": "a"}], done))
    code, report = pretend_gpu("--limit", "600")
    first = [STEP, ASSIGN, Case("forward", 24, "float32", rows=96, width=8), CONTRAST]
    assert code == 0
    assert order == [*(case.name for case in first), "tests", *parts.STEPS, rest.name, parts.TILES]
    assert (report["tests"], report["tiles"]) == (passed[0], [{"kernel": "a"}])
    # Narrow rows have targets in every type; ours, eager and compiled are about as fast here.
    assert {target["what"] for target in report["targets"]} == {"times as fast as eager", "times as fast as compiled"}


def test_a_run_that_is_stopped_keeps_what_it_has_measured(pretend_gpu, monkeypatch, tmp_path):
    measure_case = gpu.measure_case

    def stopped(case, *more):
        if case == ASSIGN:
            raise KeyboardInterrupt
        return measure_case(case, *more)

    monkeypatch.setattr(gpu, "measure_case", stopped)
    with pytest.raises(KeyboardInterrupt):
        pretend_gpu()
    report = json.loads((tmp_path / "new" / "results.json").read_text())
    assert [entry["case"] for entry in report["cases"]] == [STEP.name]


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
    assert [entry["results"]["ours"]["status"] for entry in report["cases"]] == ["wrong", "ok", "wrong", "ok"]
    assert "PROBLEM: forward, M=96, N=24, D=8, float32, ours wrong: " in capsys.readouterr().out


def test_no_case_begins_after_the_time_limit(pretend_gpu):
    code, report = pretend_gpu("--quick", "--limit", "-1")
    assert code == 0
    assert report["cases"] == []
    assert set(report["not_measured"].values()) == {gpu_report.OUT_OF_TIME}
    assert report["targets"] == []


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
