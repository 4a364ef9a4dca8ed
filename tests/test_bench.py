"""The harness of bench/, as far as it runs on a CPU: checks, competitors, turns, records, targets, tables."""

import itertools
import json
import math
import os
import subprocess
import sys
import weakref
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import bench_ops
import bench_steps
import measuring
import pytest
import report
import torch
from bench_ops import ASSIGN, BACKWARD, FORWARD, GRAPH, HARD, INFO_NCE, QUANTIZE, QUIET, STEP, SWAP, TRAINED, Case

from regvq_fast.ops import vector_quantize
from regvq_fast.ops.noise import gumbel_noise

ROOT = report.ROOT


def tiny(op, part, dtype="float32", variant=""):
    return Case(op, part, 24, dtype, 8, 2 if op == INFO_NCE else 96, variant)


def wrong(value):
    """The same numbers but for one column, the same codes but for one row."""
    other = value.clone()
    if value.is_floating_point():
        other[..., 3] += other.abs().max() / 10
    else:
        other[5] = (other[5] + 1) % 24
    return other


CASES = [tiny(op, part) for op in (QUANTIZE, INFO_NCE) for part in (STEP, FORWARD, BACKWARD)]


@pytest.mark.parametrize("case", [*CASES, tiny(QUANTIZE, FORWARD, "bfloat16"), tiny(ASSIGN, "assign")], ids=str)
def test_the_check_lets_a_right_result_through_and_no_wrong_gradient(case):
    makers, examine = case.prepare("cpu")
    assert set(case.competitors("cuda")) <= set(makers)
    results = makers["ours"]()()
    examine("ours", results)
    assert examine("matmul", makers["matmul"]()()) == {}
    if case.part in (STEP, BACKWARD):
        for gradient in (wrong(results[-1]), torch.full_like(results[-1], math.nan)):
            with pytest.raises(AssertionError, match="is off"):
                examine("ours", (*results[:-1], gradient))


def test_the_check_refuses_a_wrong_output():
    makers, examine = tiny(QUANTIZE, STEP).prepare("cpu")
    results = makers["ours"]()()
    for place, name in enumerate(("quantized", "posterior", "indices", "indices", "perturbation", "dx")):
        with pytest.raises(AssertionError, match=f"{name} (is off|are those of fp64 on 98)"):
            examine("ours", (*results[:place], wrong(results[place]), *results[place + 1 :]))
    makers, examine = tiny(ASSIGN, "assign").prepare("cpu")
    codes = wrong(*makers["ours"]()())
    assert examine("vqp nearest", (codes,))["agreement"] < 1
    with pytest.raises(AssertionError, match="nearest codes"):
        examine("ours", (codes,))


@pytest.mark.parametrize("noisy", [False, True])
def test_a_few_rows_may_tie_and_may_not_lose(noisy):
    """On one row in 2000 select the second of two equal codes: noise decides between them on stochastic rows alone."""
    given = bench_ops.quantize_inputs(replace(tiny(QUANTIZE, FORWARD), codes=2, rows=2000), "cpu")
    given["codebook"] = given["codebook"].detach()[:1].repeat(2, 1)
    given["mask"] = torch.full((2000,), noisy)
    indices = vector_quantize(**given).indices
    other = indices.clone()
    other[11] = 1 - other[11]
    with pytest.raises(AssertionError, match="miss a better code") if noisy else nullcontext():
        bench_ops.check_indices("indices", other, indices, given, given["mask"])


def test_plain_pytorch_computes_what_the_op_computes():
    """Without noise, and its gradients."""
    variants = [tiny(QUANTIZE, STEP, variant=QUIET), tiny(QUANTIZE, STEP, variant=f"{QUIET}, {HARD}")]
    for case in (*variants, tiny(INFO_NCE, STEP), tiny(ASSIGN, "assign")):
        makers, _ = case.prepare("cpu")
        for ours, plain in zip(makers["ours"]()(), makers["eager"]()(), strict=True):
            torch.testing.assert_close(plain, ours, rtol=1e-4, atol=1e-4)


def test_a_graph_has_the_seed_of_its_replay(monkeypatch):
    monkeypatch.setattr(bench_ops, "graphed", lambda run: lambda: run())
    makers, examine = tiny(QUANTIZE, STEP, variant=GRAPH).prepare("cpu")
    examine("ours", makers["ours"]()())
    monkeypatch.setattr(bench_ops, "graphed", lambda run: partial(tuple, run()))
    with pytest.raises(AssertionError, match="indices"):
        examine("ours", makers["ours"]()())


def test_weighted_and_vanilla_losses_and_other_libraries_are_told_apart():
    makers, examine = tiny(INFO_NCE, STEP).prepare("cpu")
    for name, other in (("ours", "vanilla"), ("vanilla", "ours")):
        with pytest.raises(AssertionError, match="loss is off"):
            examine(name, makers[other]()())
    makers, examine = Case(SWAP, "", 32, "float32", 8, 256, "IBQ").prepare("cpu")
    right = makers["ours"]()()
    examine("ours", right)
    examine("library", makers["library"]()())
    with pytest.raises(AssertionError, match="IBQ differs"):
        examine("library", (right[0], right[1] + 1))


@pytest.mark.parametrize(("codes", "width"), [(1024, 8), (8192, 256)])
def test_trained_like_latents_have_the_softmax_of_trained_models(codes, width):
    torch.manual_seed(0)
    given = bench_ops.quantize_inputs(Case(QUANTIZE, FORWARD, codes, "bfloat16", width, 1024, TRAINED), "cpu")
    x, codebook = given["x"].detach().float(), given["codebook"].detach().float()
    log_p = (-given["scale"] * torch.cdist(x, codebook).square()).log_softmax(1)
    noisy = log_p + gumbel_noise(given["seed"], torch.arange(1024), codes)
    assert float(-(log_p.exp() * log_p).sum(1).mean()) == pytest.approx(2.1, abs=0.15)
    assert float(log_p.exp().amax(1).mean()) == pytest.approx(0.4, abs=0.04)
    assert float((noisy.argmax(1) != log_p.argmax(1)).float().mean()) == pytest.approx(0.6, abs=0.04)


@pytest.mark.parametrize(("op", "part"), [case[:2] for case in bench_steps.MODES if case[2] == "cpu"])
def test_steps_and_samples_of_both_sides_run_and_a_wrong_first_step_is_refused(monkeypatch, op, part):
    if op in ("vqgan", "autoregressive"):
        pytest.importorskip("taming")
    sizes = {"batch_size": 2, "image_size": 32, "ch": 32, "ch_mult": (1, 1), "attn_resolutions": ()}
    monkeypatch.setattr(bench_steps, "SMALL", bench_steps.override(bench_steps.SMALL, **sizes))
    monkeypatch.setattr(bench_steps, "SIZES", {op: {"cpu": (16, 1, 2, 2, 2)}})
    makers, examine = bench_steps.Whole(op, part, "cpu").prepare("cpu")
    for mode in makers:
        if "compile" not in mode:
            examine(mode, makers[mode]()())
    if part == bench_steps.STEP:
        monkeypatch.setattr(bench_steps, "make_ours", lambda *_: (None, {"loss": math.nan, "l1": 9.0}))
        makers["fp32"]()
        with pytest.raises(AssertionError, match="loss"):
            examine("fp32", None)


def test_each_outcome_is_kept_no_tensor_of_what_failed_and_few_turns_when_the_time_is_up(monkeypatch):
    held, turns, clock = [], itertools.count(1), itertools.count(step=10.0)

    def allocated(enough):
        held.append(weakref.ref(tensor := torch.zeros(1)))
        if not enough:
            raise torch.OutOfMemoryError(f"8 GiB beside {len(tensor)}")
        return tensor

    def late():
        if next(turns) == 4:
            raise torch.OutOfMemoryError("8 GiB")

    def examine(name, results):
        assert name != "wrong"
        return {"agreement": 1.0}

    makers = {"right": lambda: lambda: None, "wrong": lambda: lambda: allocated(True)}
    makers |= {"large": lambda: allocated(False), "late": lambda: late, "broken": lambda: lambda: 1 / 0}
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: next(clock))
    outcomes = measuring.measure_side_by_side(makers, examine, "cpu")
    found = {name: measuring.record_of({"op": "x"}, name, outcome) for name, outcome in outcomes.items()}
    assert [found[name]["status"] for name in makers] == ["ok", "wrong", "out of memory", "out of memory", "failed"]
    assert (found["right"]["turns"], found["right"]["agreement"], found["right"]["op"]) == (5, 1, "x")
    assert found["broken"]["reason"].startswith("ZeroDivisionError")
    assert [tensor() for tensor in held] == [None, None]
    assert measuring.measure_side_by_side({"a": makers["right"]}, examine, "cpu", turns=0)["a"][1] == []


def test_clocks_are_tritons_for_ops_on_a_gpu_and_pytorchs_for_the_rest(monkeypatch):
    calls, timer = [], SimpleNamespace(do_bench=lambda run, **more: 2.5)
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(testing=timer))
    assert (measuring.seconds_of(lambda: calls.append(1), "cuda"), calls) == (2.5e-3, [])
    assert 0 < measuring.seconds_of(lambda: calls.append(1), "cpu") < 1
    assert len(calls) == 2  # one of them untimed


def test_memory_is_the_peak_less_what_was_there_and_what_is_returned(monkeypatch):
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    peaks = iter([100 * 2**20, 164 * 2**20])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: next(peaks))
    output = torch.zeros(2**22)  # 16 MiB
    assert measuring.peak_mib(lambda: (output, output.view(2, -1)), "cuda") == 48
    assert measuring.peak_mib(lambda: torch.zeros(2**24).sum(), "cpu") > 50


@pytest.mark.parametrize("module", [bench_ops, bench_steps])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_names_tell_cases_apart_and_few_are_compiled_on_a_cpu(module, device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    cases = module.cases(device)
    assert len({(case.op, report.name_of(case.fields())) for case in cases}) == len(cases)
    assert all(len(set(case.competitors(device))) == len(case.competitors(device)) > 1 for case in cases)
    compiled = [case for case in cases if any("compile" in name for name in case.competitors(device))]
    assert 1 <= len(compiled) <= (9 if device == "cpu" else len(cases))


FAKE = """
import measuring

class Case:
    whole, order = False, []
    def __hash__(self): return 1
    def fields(self): return {"op": "op", "part": "part", "size": {"N": 1}, "detail": "float32"}
    def competitors(self, device): return ("a", "b", "taming", "eager")
    def prepare(self, device):
        def absent(): raise measuring.SkippedError("not installed")
        def examine(name, found):
            assert name != "eager", "it is off"
            return {}
        makers = {name: lambda name=name: lambda: self.order.append(name) for name in ("a", "b", "eager")}
        return makers | {"taming": absent}, examine

CASE = Case()
def cases(device): return [CASE]
def test_case(measure, case, competitor): measure(case, competitor)
def test_turns(): assert "".join(CASE.order[:13]).endswith("aabbaabb")
"""


def test_the_suite_writes_a_record_of_each_competitor_and_goes_on_with_its_file(tmp_path):
    (tmp_path / "test_case.py").write_text(FAKE)
    flags = [str(tmp_path), "-p", "conftest", "-rs", f"--rootdir={tmp_path}", "--records", str(tmp_path / "r.json")]
    outer = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}  # a worker of xdist
    environment = outer | {"PYTHONPATH": f"{ROOT / 'bench'}:{ROOT}", "CUDA_VISIBLE_DEVICES": ""}

    def run(*more):
        command = [sys.executable, "-m", "pytest", *flags, *more]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, cwd=ROOT)
        return done.stdout, json.loads((tmp_path / "r.json").read_text())

    output, found = run("--limit", "-1")
    assert ("4 skipped" in output, found["not_measured"]) == (True, ["out of time: op, part, N = 1, float32"])
    output, found = run()
    assert "3 passed, 2 skipped" in output, output
    assert "not installed" in output
    records = {record["competitor"]: record for record in found["records"]}
    assert [records[name]["status"] for name in ("a", "b", "taming", "eager")] == ["ok", "ok", "skipped", "wrong"]
    assert (records["a"]["turns"], records["a"]["size"], found["not_measured"]) == (30, {"N": 1}, [])
    assert (found["machine"]["torch"], "ms" in records["eager"]) == (torch.__version__, False)
    output, found = run("-k", "case")
    assert ("the file of records has the case" in output, len(found["records"])) == (True, 4)


def records(case, **results):
    """Records of a case: milliseconds, or more, by competitor."""
    full = {name: value if isinstance(value, dict) else {"ms": value} for name, value in results.items()}
    return [case.fields() | {"competitor": name, "status": "ok", "mib": 1.0} | more for name, more in full.items()]


BF16 = Case(QUANTIZE, STEP, 8192, "bfloat16")
NEAREST = Case(ASSIGN, "assign", 8192, "bfloat16")
LOSSES = Case(INFO_NCE, STEP, 4096, "bfloat16", 512, 16)


@pytest.mark.parametrize(
    ("case", "results", "verdicts"),
    [
        (replace(BF16, codes=16384), {"ours": 1, "compiled": 2.2, "matmul": 0.6 / 7 + 1e-9}, ["met", "met"]),
        (Case(QUANTIZE, STEP, 8192, "float32", 64), {"ours": 1.01, "eager": 8, "compiled": 3}, ["**missed**"] * 2),
        (replace(BF16, codes=1024, variant=GRAPH), {"ours": 0.12}, ["met"]),
        (NEAREST, {"ours": 1, "matmul": 0.64, "flash-kmeans": 1}, ["**missed**", "met"]),
        (replace(BF16, part=FORWARD), {"ours": {"status": "wrong"}, "matmul": 1}, ["**missed**"]),
        (LOSSES, {"ours": 1, "vanilla": 2, "eager": 8, "inf-cl": 8}, ["met", "met"]),
    ],
)
def test_targets_are_met_or_missed_by_what_was_measured(case, results, verdicts):
    document = {"machine": {"gpu": "NVIDIA H200"}, "records": records(case, **results)}
    rows = report.targets(document).splitlines()[2:]
    assert [row.split(" | ")[-1].removesuffix(" |") for row in rows] == verdicts


def test_the_pages_match_the_results():
    assert report.main(["--check"]) == 0, "run: python bench/report.py"


def test_results_of_a_gpu_fill_tables():
    found = records(replace(BF16, codes=65536), ours=8.0, eager={"status": "out of memory"}, matmul=8.0 / 12)
    found += records(LOSSES, **{"ours": 4.0, "vanilla": 2.0, "inf-cl": 10.0, "eager": {"ms": 2.0, "mib": 0.5}})
    found += records(bench_steps.Whole("vqgan", "training step", "cpu"), taming=1500.0, fp32=500.0)
    text = report.full({"machine": {"gpu": "NVIDIA Test"}, "records": found, "not_measured": ["out of time: x"]})
    for line in (
        "M = 10240, N = 65536, D = 256, bfloat16 | 8.00 | out of memory | 1.00 | 1.00 | 258 | 50 % |",
        "| forward+backward, B = 16, L = 4096, C = 512, bfloat16 | 4.00 | 0.5 x | 5.0 x | 0.500 | 1.00 |",
        "| fp32 | 500 | 3.0 x | 1.00 |",
        "C = 512, bfloat16: eager is 2.00 x as fast, takes 0.50 of the memory",
        "Not measured:\n\n- out of time: x",
    ):
        assert line in text


def test_pages_are_written_and_broken_markers_refused(tmp_path):
    for folder in ("bench/results", "docs", "results/photos-tiny"):
        (tmp_path / folder).mkdir(parents=True)
    document = {"machine": {"gpu": "Test", "commit": "b" * 40}, "date": "2026-01-02"}
    measuring.save(tmp_path / "bench/results/gpu-test.json", document | {"records": records(BF16, ours=1.0, eager=2.0)})
    (tmp_path / "results/photos-tiny/quantizers.md").write_text("# Quantizers\n\n| a |\n| --- |\n| 1 |\n\n3 seeds.\n")
    readme, page = tmp_path / "README.md", tmp_path / "docs/page.md"
    marked = "<!-- bench:{} -->\nold\n<!-- /bench -->\n".format
    readme.write_text(marked("cpu-tables") + marked("gpu-summary"))
    page.write_text(marked("study-photos") + marked("study-emoji"))
    assert (report.main(["--check"], tmp_path), "old" in readme.read_text()) == (1, True)
    assert (report.main([], tmp_path), report.main(["--check"], tmp_path)) == (0, 0)
    assert report.NOTHING_YET.format("cpu") in readme.read_text()
    assert "bfloat16 | 1.00 | 2.0 x (eager) | 2.0 x (eager) |" in readme.read_text()
    assert "3 seeds. ([the numbers of each run](../results/photos-tiny/quantizers.csv))" in page.read_text()
    assert report.NO_STUDY in page.read_text()
    for text, message in (("<!-- bench:gpu-tables -->\n", "needs its"), (marked("x"), "no such section")):
        readme.write_text(text)
        with pytest.raises(ValueError, match=message):
            report.main([], tmp_path)
