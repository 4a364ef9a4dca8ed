"""``bench/gpu_report.py``: which targets are met, what the tables say, what counts as a problem."""

import gpu_report
import pytest
from gpu_cases import Case


def make_entry(part="forward+backward", codes=8192, dtype="bfloat16", masked=True, graph=False, **results):
    """Times in ms by competitor, or a whole result."""
    case = Case(part, codes, dtype, masked, graph)
    full = {
        name: value if isinstance(value, dict) else {"status": "ok", "ms": value, "tflops": 1.0, "host_ms": 0.1}
        for name, value in results.items()
    }
    return {
        "case": case.name,
        "op": case.op,
        "part": part,
        "dtype": dtype,
        **case.describe(),
        "products": case.products,
        "results": full,
    }


def verdicts(entry, ours="fused"):
    return {target["what"]: target["met"] for target in gpu_report.evaluate_targets([entry], ours)}


@pytest.mark.parametrize(("ours", "met"), [(1.0, True), (1.01, False)])
def test_targets_of_a_large_step(ours, met):
    entry = make_entry(fused=ours, chunked=0.1, eager=8.0, compiled=3.0, matmul=0.45 / 6 + 1e-9)
    assert verdicts(entry) == {
        "times as fast as eager": met,
        "times as fast as torch.compile": met,
        "of the matmul rate, 6 products": met,
    }
    assert all(verdicts(entry, "chunked").values())


@pytest.mark.parametrize(("ours", "met"), [(1.0, True), (1.01, False)])
def test_targets_of_a_large_forward_and_assignment(ours, met):
    assert verdicts(make_entry("forward", fused=ours, matmul=0.45)) == {"of the matmul rate": met}
    entry = make_entry("assign", fused=ours, matmul=0.65, **{"flash-kmeans": 1.0})
    assert verdicts(entry) == {"of the matmul rate": met, "times as fast as flash-kmeans": met}


@pytest.mark.parametrize(("mib", "met"), [(1907, True), (1908, False)])
def test_the_target_of_memory_is_in_gigabytes(mib, met):
    """2 GB are 1907.35 MiB."""
    entry = make_entry(codes=262144, masked=False, fused={"status": "ok", "ms": 1.0, "extra_mib": mib})
    assert verdicts(entry)["GB besides inputs and outputs"] is met


@pytest.mark.parametrize(("ours", "met"), [(0.1, True), (0.101, False)])
def test_the_target_of_a_small_step_is_under_a_graph(ours, met):
    assert verdicts(make_entry(codes=1024, graph=True, fused=ours)) == {"ms under a CUDA graph": met}
    assert verdicts(make_entry(codes=1024, fused=ours)) == {}


def test_an_absent_competitor_shows_nothing_and_a_wrong_result_misses():
    entry = make_entry(fused=1.0, eager={"status": "out of memory"}, compiled={"status": "failed"}, matmul=1.0)
    assert verdicts(entry)["times as fast as eager"] is None
    assert verdicts(entry)["of the matmul rate, 6 products"] is True
    assert set(verdicts(make_entry(fused={"status": "wrong"}, eager=9.0, matmul=1.0)).values()) == {False}
    assert verdicts(make_entry(dtype="float32", fused=1.0, eager=9.0)) == {}


def make_report(entries, **changes):
    return {
        "machine": {"gpu": "NVIDIA Test", "driver": "1.2", "torch": "2.11", "triton": "3.6"},
        "method": {"rows": 10240, "width": 256, "mask_ratio": 0.4, "repeats": 30, "default_schedule": "fused"},
        "tests": {"status": "passed", "counts": {"passed": 3}},
        "matmul_8192_tflops": {"bfloat16": 790.0},
        "cases": entries,
        "targets": gpu_report.evaluate_targets(entries, "fused"),
        "not_measured": {},
        **changes,
    }


def test_the_summary_has_ratios_then_times_then_targets():
    entries = [
        make_entry(fused=2.0, chunked=4.0, eager=20.0, compiled={"status": "out of memory"}, matmul=0.25),
        make_entry("assign", fused=0.5, eager=1.0, matmul=0.25, **{"flash-kmeans": {"status": "skipped"}}),
    ]
    lines = gpu_report.summary(make_report(entries)).splitlines()
    ratios, times, targets = (
        next(i for i, line in enumerate(lines) if line.startswith(head))
        for head in ("times as fast as", "ms on NVIDIA Test", "target")
    )
    assert ratios < times < targets
    assert lines[ratios].split()[3:] == "as eager compiled flash-kmeans % of matmul TFLOP/s MiB eager MiB".split()
    assert lines[ratios + 1].split() == "forward+backward, N=8192, bfloat16 10.0 OOM 75 1".split()
    assert lines[ratios + 2].split() == "assign, N=8192, bfloat16 2.0 - 50 1".split()
    assert lines[times + 1].split()[3:] == "2.000 4.000 20.000 OOM 0.250 0.100".split()
    assert any(line.split()[-5:] == ["eager", ">=", "8", "10", "met"] for line in lines[targets:])
    assert any(line.endswith("NOT MET") for line in lines[targets:])
    assert lines[-1] == "tests/ops passed: {'passed': 3}"


def test_columns_line_up():
    assert gpu_report.format_table([["a", "bb"], ["long", "1"], ["x", ""]]) == "a     bb\nlong   1\nx"


def test_problems_are_those_of_ours_and_of_the_tests():
    entry = make_entry(fused={"status": "wrong", "reason": "dx is off"}, eager={"status": "failed", "reason": "x"})
    tests = {"status": "failed", "counts": {"failed": 1}}
    lost = {"a": gpu_report.OUT_OF_TIME, "b": "OutOfMemoryError: 8 GiB"}
    report = make_report([entry], tests=tests, not_measured=lost)
    assert gpu_report.problems(report) == [
        "tests/ops failed: {'failed': 1}",
        "forward+backward, N=8192, bfloat16, fused wrong: dx is off",
        "b: OutOfMemoryError: 8 GiB",
    ]
    text = gpu_report.summary(report)
    assert text.startswith("TESTS OF THE OPS FAILED")
    assert "out of time, not measured: a\n" in text
    assert gpu_report.problems(make_report([make_entry(fused=1.0, chunked={"status": "skipped"})])) == []


def test_a_package_without_noise_is_compared_with_our_quantizer_without_noise():
    entry = make_entry(fused=4.0, nearest=1.0, **{"vqp nearest": 2.0, "vqp gumbel": 2.0})
    assert gpu_report.speed_up(entry, "fused", "vqp nearest") == 2.0
    assert gpu_report.speed_up(entry, "fused", "vqp gumbel") == 0.5
    assert gpu_report.speed_up(make_entry("assign", fused=4.0, **{"vqp nearest": 2.0}), "fused", "vqp nearest") == 0.5


def test_other_widths_than_the_targets_are_no_targets():
    entry = make_entry(fused=1.0, eager=1.0) | {"width": 64}
    assert gpu_report.evaluate_targets([entry], "fused") == []
