"""``bench/gpu_report.py``: which targets are met, what the tables say, what counts as a problem."""

import gpu
import gpu_report
import pytest
from gpu_cases import Case


def make_entry(part="forward+backward", codes=8192, dtype="bfloat16", case=None, **results):
    """Times in ms by competitor, or a whole result; ``case``: what else it has."""
    case = Case(part, codes, dtype, **(case or {}))
    full = {
        name: value if isinstance(value, dict) else {"status": "ok", "ms": value, "tflops": 1.0, "host_ms": 0.1}
        for name, value in results.items()
    }
    return gpu.entry(case, full)


def verdicts(entry, gpu="NVIDIA H200"):
    return {target["what"]: target["met"] for target in gpu_report.evaluate_targets([entry], gpu)}


@pytest.mark.parametrize(("ours", "met"), [(1.0, True), (1.01, False)])
def test_targets_of_a_wide_step(ours, met):
    """Of the matmul rate over the 7 products that the kernels do, whatever the case counts."""
    entry = make_entry(codes=16384, ours=ours, eager=1.0, compiled=2.2, matmul=0.6 / 7 + 1e-9)
    assert verdicts(entry) == {"times as fast as compiled": met, "of the matmul rate, 7 products": met}
    hard = make_entry(case={"codebook_grad": "hard"}, ours=ours, compiled=2.2, matmul=1.0)
    assert verdicts(hard) == {"times as fast as compiled": met}
    assert verdicts(make_entry(codes=512, ours=ours, compiled=9.0, matmul=1.0)) == {}


@pytest.mark.parametrize(("ours", "met"), [(1.0, True), (1.01, False)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_targets_of_a_narrow_step(ours, met, dtype):
    entry = make_entry(dtype=dtype, case={"width": 64}, ours=ours, eager=8.0, compiled=3.0, matmul=1.0)
    assert verdicts(entry) == {"times as fast as eager": met, "times as fast as compiled": met}
    assert verdicts(make_entry(case={"width": 128}, ours=ours, eager=8.0, compiled=3.0)) == {}


@pytest.mark.parametrize(("ours", "met"), [(1.0, True), (1.01, False)])
def test_targets_of_a_large_forward_and_assignment(ours, met):
    assert verdicts(make_entry("forward", ours=ours, matmul=0.45)) == {"of the matmul rate": met}
    entry = make_entry("assign", ours=ours, matmul=0.65, **{"flash-kmeans": 1.0})
    assert verdicts(entry) == {"of the matmul rate": met, "times as fast as flash-kmeans": met}


@pytest.mark.parametrize(("mib", "met"), [(1907, True), (1908, False)])
def test_the_target_of_memory_is_in_gigabytes(mib, met):
    """2 GB are 1907.35 MiB."""
    entry = make_entry(codes=262144, case={"masked": False}, ours={"status": "ok", "ms": 1.0, "extra_mib": mib})
    assert verdicts(entry)["GB besides inputs and outputs"] is met


@pytest.mark.parametrize(("codes", "graph", "most"), [(1024, True, 0.12), (8192, False, 0.68), (65536, False, 5.5)])
def test_targets_in_milliseconds_are_of_an_h200(codes, graph, most):
    what = "ms under a CUDA graph" if graph else "ms"
    for ms, met in ((most, True), (1.01 * most, False)):
        entry = make_entry(codes=codes, case={"graph": graph}, ours=ms)
        assert verdicts(entry) == {what: met}
        assert verdicts(entry, "NVIDIA A100") == {}
    assert verdicts(make_entry(codes=codes, case={"graph": graph, "latents": "trained-like"}, ours=most)) == {}


def test_an_absent_competitor_shows_nothing_and_a_wrong_result_misses():
    entry = make_entry(ours=0.5, compiled={"status": "out of memory"}, matmul=1.0)
    assert verdicts(entry) == {"of the matmul rate, 7 products": True, "ms": True}
    wrong = make_entry(ours={"status": "wrong"}, compiled=9.0, matmul=1.0)
    assert verdicts(wrong) == {"times as fast as compiled": False, "of the matmul rate, 7 products": False, "ms": False}
    assert verdicts(make_entry(dtype="float32", ours=1.0, eager=9.0)) == {}


def make_report(entries, **changes):
    return {
        "machine": {"gpu": "NVIDIA Test", "driver": "1.2", "torch": "2.11", "triton": "3.6"},
        "method": {"rows": 10240, "width": 256, "mask_ratio": 0.4, "repeats": 30},
        "tests": {"status": "passed", "counts": {"passed": 3}},
        "matmul_8192_tflops": {"bfloat16": 790.0},
        "cases": entries,
        "targets": gpu_report.evaluate_targets(entries, "NVIDIA H200"),
        "not_measured": {},
        **changes,
    }


def test_the_summary_has_a_table_of_each_op_then_targets():
    entries = [
        make_entry(ours=2.0, eager=20.0, compiled={"status": "out of memory"}, matmul=0.25),
        make_entry("assign", ours=0.5, eager=1.0, matmul=0.25, **{"flash-kmeans": {"status": "skipped"}}),
    ]
    entries[0]["results"]["ours"]["extra_mib"] = 125.0
    lines = gpu_report.summary(make_report(entries)).splitlines()
    table, targets = (
        next(i for i, line in enumerate(lines) if line.split()[:1] == [head]) for head in ("ms", "target")
    )
    assert table < targets
    head = "ms host eager compiled flash-kmeans % of matmul TFLOP/s MiB ours MiB eager MiB compiled"
    assert lines[table].split() == head.split()
    assert lines[table + 1].split()[3:] == "2.000 0.100 10.0 OOM 75 1 125 OOM".split()
    assert lines[table + 2].split()[3:] == "0.500 0.100 2.0 - 50 1".split()
    assert any(line.split()[-4:] == [">=", "0.6", "0.875", "met"] for line in lines[targets:])
    assert any(line.endswith("MISSED") for line in lines[targets:])
    assert lines[-1] == "tests/ops passed: {'passed': 3}"


def test_columns_line_up():
    assert gpu_report.format_table([["a", "bb"], ["long", "1"], ["x", ""]]) == "a     bb\nlong   1\nx"


def test_problems_are_those_of_ours_and_of_the_tests():
    entry = make_entry(ours={"status": "wrong", "reason": "dx is off"}, eager={"status": "failed", "reason": "x"})
    tests = {"status": "failed", "counts": {"failed": 1}}
    lost = {"a": gpu_report.OUT_OF_TIME, "b": "OutOfMemoryError: 8 GiB"}
    report = make_report([entry], tests=tests, not_measured=lost)
    assert gpu_report.problems(report) == [
        "tests/ops failed: {'failed': 1}",
        "forward+backward, N=8192, bfloat16, ours wrong: dx is off",
        "b: OutOfMemoryError: 8 GiB",
    ]
    text = gpu_report.summary(report)
    assert text.startswith("TESTS OF THE OPS FAILED")
    assert "out of time, not measured: a\n" in text
    assert gpu_report.problems(make_report([make_entry(ours=1.0, eager={"status": "skipped"})])) == []


def test_a_package_without_noise_is_compared_with_our_quantizer_without_noise():
    entry = make_entry(ours=4.0, nearest=1.0, **{"vqp nearest": 2.0, "vqp gumbel": 2.0})
    assert gpu_report.speed_up(entry, "ours", "vqp nearest") == 2.0
    assert gpu_report.speed_up(entry, "ours", "vqp gumbel") == 0.5
    assert gpu_report.speed_up(make_entry("assign", ours=4.0, **{"vqp nearest": 2.0}), "ours", "vqp nearest") == 0.5
