"""Harness of bench/ on a CPU: checks, turns, records, a GPU's session, targets, tables."""

import json
import math
import subprocess
import sys
import weakref
from contextlib import nullcontext
from types import SimpleNamespace

import bench_ops
import bench_steps
import gpu
import measuring
import pytest
import report
import step_peers
import torch
from bench_ops import ASSIGN, BACKWARD, FORWARD, STEP, InfoNce, Quantize, Swapped
from helpers.tiny_models import tiny_vqgan
from measuring import Measured, SkippedError, WrongResultError

from regvq_fast.ops import vector_quantize
from regvq_fast.ops.noise import gumbel_noise
from regvq_fast.priors.diffusion.loss import MaskAndReplace, diffusion_terms
from regvq_fast.priors.maskgit import MaskGIT, sample_maskgit
from regvq_fast.quantizers import NearestQuantizer

ROOT = measuring.ROOT
SMALL = {"codes": 24, "width": 8, "rows": 96}


def tiny(part, dtype="float32", kind=Quantize, **more):
    return kind(part, dtype=dtype, **(SMALL | more))


# ------------------------------------------------------------------------------ checks and competitors


def off(value):
    wrong = value.clone()
    wrong[..., 3] += wrong.abs().max() / 10
    return wrong


def next_code(value):
    wrong = value.clone()
    wrong[5] = (wrong[5] + 1) % 24
    return wrong


@pytest.mark.parametrize(
    "case",
    [tiny(part) for part in (STEP, FORWARD, BACKWARD, ASSIGN)]
    + [tiny(FORWARD, "bfloat16")]
    + [tiny(part, kind=InfoNce) for part in (STEP, FORWARD, BACKWARD)],
    ids=lambda case: case.name,
)
def test_the_check_lets_a_right_result_through_and_no_wrong_gradient(case):
    makers, examine = case.prepare("cpu")
    assert set(case.competitors("cuda")) <= set(makers)
    results = makers["ours"]()()
    examine("ours", results)
    assert examine("matmul", makers["matmul"]()()) == {}
    if case.part in (STEP, BACKWARD):
        with pytest.raises(WrongResultError, match="is off by"):
            examine("ours", (*results[:-1], off(results[-1])))
        with pytest.raises(WrongResultError, match="is off by nan"):
            examine("ours", (*results[:-1], torch.full_like(results[-1], math.nan)))


@pytest.mark.parametrize(
    ("place", "change", "message"),
    [
        (0, off, "quantized isn't"),
        (1, off, "posterior isn't"),
        (2, next_code, "indices differ"),
        (2, lambda indices: indices - 24, "indices aren't codes"),
        (3, next_code, "best_indices differ"),
        (4, off, "perturbation isn't"),
        (5, off, "dx is off"),
    ],
)
def test_the_check_refuses_a_wrong_output(place, change, message):
    makers, examine = tiny(STEP).prepare("cpu")
    results = list(makers["ours"]()())
    results[place] = change(results[place])
    with pytest.raises(WrongResultError, match=message):
        examine("ours", tuple(results))


@pytest.mark.parametrize("noisy", [False, True])
def test_a_few_rows_may_tie_and_may_not_lose(noisy):
    """On one row in 200 the second of two equal codes: the noise decides between them on stochastic rows alone."""
    given = tiny(FORWARD, "float64", codes=2, rows=200).inputs("cpu")
    given["codebook"] = given["codebook"].detach()[:1].repeat(2, 1)
    given["mask"] = torch.full((200,), noisy)
    indices = vector_quantize(**given).indices
    other = indices.clone()
    other[11] = 1 - other[11]
    with pytest.raises(WrongResultError, match="miss a better code") if noisy else nullcontext():
        bench_ops.check_indices("indices", other, indices, given, given["mask"])


PLAIN = [tiny(STEP, masked=False, codebook_grad=kind) for kind in ("soft", "hard")] + [tiny(STEP, kind=InfoNce)]


@pytest.mark.parametrize("case", PLAIN, ids=lambda case: case.name)
def test_plain_pytorch_computes_what_the_op_computes(case):
    """Without noise, and its gradients."""
    makers, _ = case.prepare("cpu")
    for ours, plain in zip(makers["ours"]()(), makers["eager"]()(), strict=True):
        torch.testing.assert_close(plain, ours, rtol=1e-4, atol=1e-4)


def test_weighted_and_vanilla_losses_and_other_libraries_are_told_apart():
    makers, examine = tiny(STEP, kind=InfoNce).prepare("cpu")
    for name, other in (("ours", "vanilla"), ("vanilla", "ours")):
        with pytest.raises(WrongResultError, match="loss is off"):
            examine(name, makers[other]()())
    makers, examine = Swapped(STEP, 32, "float32", 8, 256, "IBQ").prepare("cpu")
    right = makers["ours"]()()
    examine("ours", right)
    examine("library", makers["library"]()())
    with pytest.raises(WrongResultError, match="IBQ differs"):
        examine("library", (right[0], right[1] + 1))


@pytest.mark.parametrize(("codes", "width"), [(1024, 8), (8192, 256)])
def test_trained_like_latents_have_the_softmax_of_trained_models(codes, width):
    given = Quantize(FORWARD, codes, "bfloat16", width, 1024, latents="trained-like").inputs("cpu")
    x, codebook = given["x"].detach().float(), given["codebook"].detach().float()
    log_p = (-given["scale"] * torch.cdist(x, codebook).square()).log_softmax(1)
    noisy = log_p + gumbel_noise(given["seed"], torch.arange(1024), codes)
    assert float(-(log_p.exp() * log_p).sum(1).mean()) == pytest.approx(2.1, abs=0.15)
    assert float(log_p.exp().amax(1).mean()) == pytest.approx(0.4, abs=0.04)
    assert float((noisy.argmax(1) != log_p.argmax(1)).float().mean()) == pytest.approx(0.6, abs=0.04)


def test_plain_diffusion_and_maskgit_compute_what_ours_do():
    torch.manual_seed(0)
    chain, tokens, t = MaskAndReplace(32), torch.randint(32, (6, 16)), torch.tensor([1, 2, 30, 60, 99, 100])
    noisy, logits = chain.corrupt(tokens, t, torch.tensor(0)), 3 * torch.randn(6, 16, 32)
    terms, plain = diffusion_terms(chain, logits, tokens, noisy, t), step_peers.PlainDiffusion(chain)
    for ours, theirs in zip((terms.bound, terms.cross_entropy), plain.bound(logits, tokens, noisy, t), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    prior = MaskGIT(32, 5, token_shape=(4, 4), label_names="abcde", width=32, depth=1, heads=2).eval()
    torch.nn.init.normal_(prior.pos_emb)
    labels, masked = torch.randint(5, (6, 1)), torch.rand(6, 16) < 0.6
    ours = prior.loss(tokens, labels, masked, label_smoothing=0.1).mean()
    torch.testing.assert_close(step_peers.maskgit_loss(prior, tokens, labels, masked), ours)
    greedy = {"seed": 0, "steps": 4, "guidance": 2.0, "temperature": 0.0, "choice_temperature": 0.0}
    found = sample_maskgit(prior, labels, **greedy).flatten(1)
    assert (found == step_peers.maskgit_sample(prior, labels, 4, 2.0, greedy=True)).float().mean() > 0.95


@pytest.mark.parametrize("op", ["vqgan", "autoregressive", "diffusion", "masked"])
def test_steps_and_samples_of_both_sides_run_and_a_wrong_first_step_is_refused(monkeypatch, op):
    if op in ("vqgan", "autoregressive"):
        pytest.importorskip("taming")
    sizes = {"batch_size": 2, "image_size": 32, "ch": 32, "ch_mult": (1, 1), "attn_resolutions": ()}
    monkeypatch.setattr(bench_steps, "SMALL", bench_steps.override(bench_steps.SMALL, **sizes))
    monkeypatch.setattr(bench_steps, "SIZES", {op: {"cpu": (16, 1, 2, 2, 2)}})
    monkeypatch.setattr(bench_steps, "VQGAN", lambda quantizer, **_: tiny_vqgan(NearestQuantizer(32, 4)))
    monkeypatch.setattr(bench_steps, "NUM_CODES", 32)
    for part in ("sampling", "training step") if op != "vqgan" else ("training step",):
        makers, examine = bench_steps.Whole(op, part, "cpu").prepare("cpu")
        for mode in makers:
            if "compile" not in mode:
                examine(mode, makers[mode]()())
    monkeypatch.setattr(bench_steps, "first_step", lambda *_: {"loss": math.nan, "l1": 9.0})
    makers["fp32"]()
    with pytest.raises(WrongResultError, match="in the first step"):
        examine("fp32", None)


# ------------------------------------------------------------------------------ turns, clocks, records


def test_competitors_take_turns_until_the_time_is_up():
    order = []
    runs = {name: lambda name=name: order.append(name) for name in "ab"}
    assert measuring.take_turns(runs, lambda run: run(), 3, 1, math.inf) == {name: [None] * 3 for name in "ab"}
    assert order == list("ababab")
    assert len(measuring.take_turns(runs, lambda run: run(), 100, 2, -1.0)["a"]) == 2


def test_each_outcome_is_kept_and_no_tensor_of_what_failed():
    held, calls = [], []

    def too_large():
        held.append(weakref.ref(tensor := torch.zeros(1)))
        raise torch.OutOfMemoryError(f"8 GiB beside {len(tensor)}")

    def late():
        calls.append(1)
        if len(calls) == 4:
            raise torch.OutOfMemoryError("8 GiB")

    def absent():
        raise SkippedError("x is not installed")

    def examine(name, results):
        bench_ops.require("dx", name != "wrong", "is off")
        return {"agreement": 1.0}

    runs = {name: lambda: lambda: None for name in ("right", "wrong")}
    makers = runs | {"large": too_large, "late": lambda: late, "absent": absent, "broken": lambda: lambda: 1 / 0}
    outcomes = measuring.measure_side_by_side(makers, examine, "cpu", turns=5)
    found = {name: "ok" if isinstance(o, Measured) else measuring.status_of(o) for name, o in outcomes.items()}
    expected = {"right": "ok", "wrong": "wrong", "large": "out of memory", "late": "out of memory"}
    assert found == expected | {"absent": "skipped", "broken": "failed"}
    assert len(outcomes["right"].seconds) == 5
    assert outcomes["right"].found["agreement"] == 1
    assert held[0]() is None
    outcomes = measuring.measure_side_by_side(runs, examine, "cpu", until=-1.0)
    assert {measuring.status_of(outcome) for outcome in outcomes.values()} == {"out of time"}


def test_clocks_are_tritons_for_ops_on_a_gpu_and_pytorchs_for_the_rest(monkeypatch):
    calls = []
    bench = SimpleNamespace(do_bench=lambda run, **more: 2.5)
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(testing=bench))
    assert measuring.seconds_of(lambda: calls.append(1), "cuda") == 2.5e-3
    assert calls == []
    assert 0 < measuring.seconds_of(lambda: calls.append(1), "cpu") < 1
    assert len(calls) == 2  # one of them untimed


def test_memory_is_the_peak_less_what_was_there_and_what_is_returned(monkeypatch):
    told = {"synchronize": None, "reset_peak_memory_stats": None}
    told |= {"memory_allocated": 100 * 2**20, "max_memory_allocated": 164 * 2**20}
    for name, value in told.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    output = torch.zeros(2**22)  # 16 MiB
    assert measuring.peak_mib(lambda: (output, output.view(2, -1)), "cuda") == 48
    assert measuring.peak_mib(lambda: torch.zeros(2**24).sum(), "cpu") > 50


@pytest.mark.parametrize("module", [bench_ops, bench_steps])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_names_tell_cases_apart_and_few_are_compiled_on_a_cpu(module, device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    cases = module.cases(device)
    assert len({case.name for case in cases}) == len(cases) == len({json.dumps(case.facts()) for case in cases})
    assert all(len(set(case.competitors(device))) == len(case.competitors(device)) > 1 for case in cases)
    compiled = [case for case in cases if any("compile" in name for name in case.competitors(device))]
    assert 1 <= len(compiled) <= (9 if device == "cpu" else len(cases))
    if module is bench_ops:
        assert {512, 65536} <= {case.codes for case in cases}
        assert {8, 16, 32, 64, 256, 512} <= {case.width for case in cases}


WORDS = ("ok", "ok", "skipped", "wrong")
FAKE = """
import measuring

class Case:
    name, whole, order = "case", False, []
    def __hash__(self): return 1
    def facts(self): return {"op": "op", "part": "part", "size": {"N": 1}, "detail": "float32"}
    def competitors(self, device): return "abcd"
    def prepare(self, device):
        def absent(): raise measuring.SkippedError("c is not installed")
        def examine(name, found):
            if name == "d": raise measuring.WrongResultError("d is off")
            return {}
        makers = {name: lambda name=name: lambda: self.order.append(name) for name in "abd"}
        return makers | {"c": absent}, examine

CASE = Case()
def cases(device): return [CASE]
def test_case(measure, case, competitor): measure(case, competitor)
def test_turns(): assert "".join(CASE.order[:13]).endswith("aabbaabb")
"""


def test_the_suite_writes_a_record_of_each_competitor_and_goes_on_with_its_file(tmp_path):
    (tmp_path / "test_case.py").write_text(FAKE)
    flags = [str(tmp_path), "-p", "conftest", "-rs", f"--rootdir={tmp_path}", "--records", str(tmp_path / "r.json")]
    variables = {"PYTHONPATH": f"{ROOT / 'bench'}:{ROOT}", "CUDA_VISIBLE_DEVICES": ""}
    output, code, _ = gpu.run_python(["-m", "pytest", *flags, "--limit", "-1"], 120.0, **variables)
    assert "4 skipped" in output
    assert json.loads((tmp_path / "r.json").read_text())["not_measured"] == {"case": "out of time"}
    output, code, _ = gpu.run_python(["-m", "pytest", *flags], 120.0, **variables)
    assert (code, "3 passed, 2 skipped" in output, "c is not installed" in output) == (0, True, True)
    found = json.loads((tmp_path / "r.json").read_text())
    records = {record["competitor"]: record for record in found["records"]}
    assert {name: record["status"] for name, record in records.items()} == dict(zip("abcd", WORDS, strict=True))
    assert (records["a"]["turns"], records["a"]["size"], found["not_measured"]) == (30, {"N": 1}, {})
    assert (found["machine"]["torch"], "ms" in records["d"]) == (torch.__version__, False)
    output, _, _ = gpu.run_python(["-m", "pytest", *flags, "-k", "case"], 120.0, **variables)
    assert "the file of records has the case" in output
    assert len(json.loads((tmp_path / "r.json").read_text())["records"]) == 4


# ------------------------------------------------------------------------------ a GPU's session


def records(case, **results):
    """Records of a case: milliseconds, or more, by competitor."""
    full = {name: value if isinstance(value, dict) else {"ms": value} for name, value in results.items()}
    return [case.facts() | {"competitor": name, "status": "ok", "mib": 1.0} | more for name, more in full.items()]


def test_a_session_runs_its_parts_in_order_and_keeps_what_they_left(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(measuring, "describe_machine", lambda _: {"gpu": "NVIDIA H200", "commit": "a" * 40})
    order, path = [], tmp_path / "gpu.json"
    ours = {"status": "ok", "ms": 1.0, "mib": 2000.0}

    def run(arguments, limit, **variables):
        order.append(next(word for word in arguments if "/" in word and not word.startswith("-")))
        if "--records" in arguments and order.count(gpu.OPS) == 1 and gpu.STEPS not in order:
            found = measuring.load(path, "cuda")
            found["records"] += records(Quantize(STEP, 262144, "bfloat16", masked=False), ours=ours, compiled=2.0)
            measuring.save(path, found | {"not_measured": {"b": "out of time"}})
        if order[-1] == "tests/ops":
            return "F.\nFAILED tests/ops/test_a.py::b - no\n1 failed, 41 passed in 3.20s", 1, 7.0
        return ("..", None, 90.0) if order[-1] == gpu.STEPS else ("1 passed in 2s", 0, 7.0)

    monkeypatch.setattr(gpu, "run_python", run)
    assert gpu.main(["--out", str(path), "--limit", "600"]) == 1
    assert sorted(order[1:3]) == sorted(["tests/ops", gpu.STEPS])  # compiled while the tests run
    assert [order[0], *order[3:]] == [gpu.OPS, gpu.STEPS, gpu.OPS, gpu.TILES]
    found = json.loads(path.read_text())
    assert {name: part["status"] for name, part in found["parts"].items()}[gpu.STEPS] == "stopped at the time limit"
    assert (found["parts"]["tests/ops"]["passed"], found["parts"][gpu.OPS]["measured"]) == (41, 2)
    met = {target["what"]: target["met"] for target in found["targets"]}
    assert met == {"times as fast as compiled": False, "GB besides inputs and outputs": False}
    out = capsys.readouterr().out
    assert "PROBLEM: tests/ops: FAILED tests/ops/test_a.py::b - no" in out
    assert "- out of time: b\n- `bench/bench_steps.py` stopped at the time limit after 90 s" in out


def test_a_process_is_stopped_at_its_limit_and_no_gpu_is_an_error():
    assert gpu.run_python(["-c", "import time; time.sleep(60)"], 0.5)[1] is None
    code = "import torch, gpu; torch.cuda.is_available = lambda: False; raise SystemExit(gpu.main([]))"
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT / 'bench')!r}); {code}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr.splitlines()) == (2, "", [gpu.NO_CUDA])


@pytest.mark.parametrize(
    ("case", "results", "verdicts"),
    [
        (Quantize(STEP, 16384, "bfloat16"), {"ours": 1, "compiled": 2.2, "matmul": 0.6 / 7 + 1e-9}, [True, True]),
        (Quantize(STEP, 8192, "float32", 64), {"ours": 1.01, "eager": 8, "compiled": 3}, [False, False]),
        (Quantize(STEP, 1024, "bfloat16", graph=True), {"ours": 0.12}, [True]),
        (Quantize(ASSIGN, 8192, "bfloat16"), {"ours": 1, "matmul": 0.64, "flash-kmeans": 1}, [False, True]),
        (Quantize(FORWARD, 8192, "bfloat16"), {"ours": {"status": "wrong"}, "matmul": 1}, [False]),
        (InfoNce(STEP, 4096, "bfloat16", 512), {"ours": 1, "vanilla": 2, "eager": 8, "inf-cl": 8}, [True, True]),
    ],
)
def test_targets_are_met_or_missed_by_what_was_measured(case, results, verdicts):
    document = {"machine": {"gpu": "NVIDIA H200"}, "records": records(case, **results)}
    assert [target["met"] for target in gpu.targets_of(document)] == verdicts


# ------------------------------------------------------------------------------------------------------------- tables


def test_the_pages_match_the_results():
    assert list(report.stale()) == [], "run: python bench/report.py"


def test_results_of_a_gpu_fill_tables():
    oom = {"status": "out of memory"}
    found = [
        record
        for n, ours, eager in ((8192, 1.0, 12.0), (65536, 8.0, oom))
        for record in records(Quantize(STEP, n, "bfloat16"), ours=ours, eager=eager, matmul=ours / 12)
    ]
    losses = {"ours": 4.0, "vanilla": 2.0, "inf-cl": 10.0, "eager": {"ms": 2.0, "mib": 0.5}}
    found += records(InfoNce(STEP, 4096, "bfloat16", 512), **losses)
    found += records(bench_steps.Whole("vqgan", "training step", "cpu"), taming=1500.0, fp32=500.0)
    text = report.full({"machine": {"gpu": "NVIDIA Test"}, "records": found})
    for line in (
        "| forward+backward, M = 10240, N = 8192, D = 256, bfloat16 | 1.00 | 12.0 x | 1.00 | 1.00 | 258 | 50 % |",
        "M = 10240, N = 65536, D = 256, bfloat16 | 8.00 | out of memory | 1.00 | 1.00 | 258 | 50 % |",
        "| forward+backward, B = 16, L = 4096, C = 512, bfloat16 | 4.00 | 0.5 x | 5.0 x | 0.500 | 1.00 |",
        "| fp32 | 500 | 3.0 x | 1.00 |",
        "C = 512, bfloat16: eager is 2.00 x as fast, takes 0.50 of the memory",
    ):
        assert line in text


def test_pages_are_written_and_broken_markers_refused(tmp_path, capsys):
    for folder in ("bench/results", "docs"):
        (tmp_path / folder).mkdir(parents=True)
    cases = [Quantize(STEP, n, "bfloat16") for n in (1024, 8192)]
    found = [record for case in cases for record in records(case, ours=1.0, eager=2.0)]
    document = {"machine": {"gpu": "Test", "commit": "b" * 40}, "date": "2026-01-02", "records": found}
    measuring.save(tmp_path / "bench/results/gpu-test.json", document)
    page = tmp_path / "README.md"
    page.write_text("<!-- bench:cpu-tables -->\nold\n<!-- /bench -->\n<!-- bench:gpu-plots -->\n<!-- /bench -->\n")
    study = tmp_path / "results/photos-tiny"
    study.mkdir(parents=True)
    (study / "quantizers.md").write_text("# Quantizers\n\n| a |\n| --- |\n| 1 |\n\n3 seeds.\n")
    sections = [f"<!-- bench:study-{name} -->\n<!-- /bench -->" for name in ("photos", "emoji")]
    (tmp_path / "docs/page.md").write_text("\n".join(sections))
    root = ["--root", str(tmp_path)]
    assert (report.main([*root, "--check"]), "old" in page.read_text()) == (1, True)
    assert (report.main(root), report.main([*root, "--check"])) == (0, 0)
    assert report.NOTHING_YET.format(report.HOW["cpu"]) in page.read_text()
    studies = (tmp_path / "docs/page.md").read_text()
    assert "3 seeds. ([the numbers of each run](../results/photos-tiny/quantizers.csv))" in studies
    assert report.NO_STUDY in studies
    plots = sorted(path.name for path in (tmp_path / "docs/pictures").iterdir())
    assert plots == ["bench-gpu-test-memory.png", "bench-gpu-test-speed-up.png"]
    for text, message in (
        ("<!-- bench:gpu-tables -->\n", "needs its"),
        ("<!-- bench:x -->\n<!-- /bench -->", "no such section"),
    ):
        page.write_text(text)
        with pytest.raises(ValueError, match=message):
            report.main(root)
