"""The ``weighted_info_nce`` cases of ``bench/gpu.py`` as far as a CPU can tell: gate, competitors, targets."""

import sys
from types import ModuleType

import gpu
import gpu_info_nce
import gpu_report
import peers
import pytest
import torch
from gpu_cases import WrongResultError
from gpu_info_nce import InfoNceCase

STEP = InfoNceCase("forward+backward", 48, 8, "float32", rows=96)


@pytest.fixture(scope="module", params=[STEP, InfoNceCase("forward", 48, 8, "bfloat16", rows=96)])
def prepared(request):
    inputs = gpu_info_nce.make_inputs(request.param, "cpu")
    return request.param, inputs, gpu_info_nce.truth_of(request.param, inputs)


@pytest.mark.parametrize("name", ["ours", "vanilla"])
def test_the_gate_lets_a_right_result_through(prepared, name):
    case, inputs, truth = prepared
    run = gpu_info_nce.competitors(case, inputs)[name]()
    assert len(run()) == (2 if case is STEP else 1)
    assert gpu_info_nce.examine(case, inputs, truth, name, run)["loss_error"] < 1e-4


def _off(loss, gradient):
    loss[1, 3] += 2e-3
    return loss, gradient


def _nan(loss, gradient):
    gradient[0, 3, 2] = torch.nan
    return loss, gradient


def _one_row(loss, gradient):
    gradient[1, 7] *= 1.001
    return loss, gradient


@pytest.mark.parametrize(
    ("change", "message"),
    [(_off, "loss is off by 0.002"), (_nan, "dkey is off by nan"), (_one_row, "dkey is off by 0.001")],
)
def test_the_gate_refuses_a_wrong_result(change, message):
    inputs = gpu_info_nce.make_inputs(STEP, "cpu")
    truth = gpu_info_nce.truth_of(STEP, inputs)
    wrong = change(*(value.clone() for value in gpu_info_nce.make_ours(STEP, inputs, inputs.weight)()))
    with pytest.raises(WrongResultError, match=message):
        gpu_info_nce.examine(STEP, inputs, truth, "ours", lambda: wrong)


def test_the_gate_tells_the_weighted_loss_from_the_vanilla_one():
    inputs = gpu_info_nce.make_inputs(STEP, "cpu")
    truth, makers = gpu_info_nce.truth_of(STEP, inputs), gpu_info_nce.competitors(STEP, inputs)
    for name, other in (("ours", "vanilla"), ("vanilla", "ours")):
        with pytest.raises(WrongResultError, match="loss is off"):
            gpu_info_nce.examine(STEP, inputs, truth, name, makers[other]())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_gate_sees_the_negatives_of_every_key(dtype):
    """A tenth of the negatives' part of the gradient is missing: most rows alone would tell. See make_inputs."""
    case = InfoNceCase("forward+backward", 512, 64, dtype, rows=512)
    inputs = gpu_info_nce.make_inputs(case, "cpu")
    loss, gradient = gpu_info_nce.truth_of(case, inputs).weighted
    query, key = inputs.query.double(), inputs.key.detach().double()
    similarity = query @ key.mT / gpu_info_nce.TAU
    negatives = (similarity - torch.diag_embed(torch.full((1, 512), torch.inf))).exp()
    total = negatives.sum(2) + 512 * inputs.weight * similarity.diagonal(dim1=1, dim2=2).exp()
    part = (negatives * (inputs.grad_loss / total).unsqueeze(2)).mT @ query / gpu_info_nce.TAU
    missing = 0.1 * part
    assert (missing.norm(dim=2) / gradient.norm(dim=2)).median() > gpu_info_nce.GRADIENT_TOLERANCE[inputs.query.dtype]
    with pytest.raises(WrongResultError, match="dkey is off"):
        gpu_info_nce.check(inputs.query.dtype, (loss, gradient), (loss, gradient - missing))


def test_plain_pytorch_computes_what_the_op_computes():
    case = InfoNceCase("forward+backward", 48, 8, "float64", rows=96)
    inputs = gpu_info_nce.make_inputs(case, "cpu")
    plain = gpu_info_nce.make_plain(case, inputs, compiles=False)()
    for ours, other in zip(gpu_info_nce.truth_of(case, inputs).weighted, plain, strict=True):
        torch.testing.assert_close(ours, other)


def test_inf_cl_is_called_image_by_image_as_it_wants_to_be(monkeypatch):
    """A stand-in with its signature and its layout, heads of ``head_dim`` channels: vanilla InfoNCE of every image."""
    calls = []

    def cal_flash_loss(q, k, labels=None, scale=None, head_dim=256):
        calls.append((tuple(q.shape), head_dim))
        q, k = (scale * q).view(len(q), -1, head_dim).float(), k.view(len(k), -1, head_dim).float()
        return torch.einsum("mhd,nhd->mn", q, k).logsumexp(1) - torch.einsum("mhd,mhd->m", q, k)

    module = ModuleType("inf_cl")
    module.cal_flash_loss = cal_flash_loss
    monkeypatch.setitem(sys.modules, "inf_cl", module)
    for width, head in ((64, 64), (512, 256)):
        case = InfoNceCase("forward+backward", 48, width, "float32", rows=96)
        inputs = gpu_info_nce.make_inputs(case, "cpu")
        truth = gpu_info_nce.truth_of(case, inputs)
        gpu_info_nce.check(torch.float32, truth.vanilla, gpu_info_nce.competitors(case, inputs)["inf-cl"]()())
        assert calls == 2 * [((48, width), head)]
        calls.clear()


def test_without_inf_cl_its_name_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "inf_cl", None)
    with pytest.raises(peers.SkippedError, match="pip install inf-cl"):
        peers.inf_cl(torch.zeros(1, 2, 4), torch.zeros(1, 2, 4), 0.07)


def test_the_work_of_a_case():
    case = InfoNceCase("forward+backward", 4096, 512, "bfloat16")
    assert (case.images, case.products, case.flops) == (16, 3, 3 * 2 * 16 * 4096**2 * 512)
    assert InfoNceCase("forward", 65536, 64, "bfloat16").flops == 2 * 65536**2 * 64
    cases = [
        case for case in gpu.first_cases("bfloat16") + gpu.other_cases("bfloat16") if isinstance(case, InfoNceCase)
    ]
    sizes = {(length, width) for length in (256, 1024, 4096, 16384, 65536) for width in (128, 512)}
    for part in gpu_info_nce.PARTS:
        assert {(case.length, case.width) for case in cases if case.part == part} == sizes | {(65536, 64)}


def make_entry(length, width, part="forward+backward", **results):
    case = InfoNceCase(part, length, width, "bfloat16")
    full = {
        name: value if isinstance(value, dict) else {"status": "ok", "ms": value} for name, value in results.items()
    }
    entry = {"case": case.name, "op": case.op, "part": part, "dtype": case.dtype, **case.describe()}
    return entry | {"products": case.products, "results": full}


def verdicts(entry):
    return {target["what"]: target["met"] for target in gpu_report.evaluate_targets([entry], "NVIDIA H200")}


@pytest.mark.parametrize(("ours", "met"), [(1.0, True), (1.01, False)])
def test_targets_of_a_step(ours, met):
    """inf-cl is compared with ours without weights, the others with ours."""
    entry = make_entry(4096, 512, ours=ours, vanilla=2 * ours, eager=8.0, matmul=0.4 / 3 + 1e-9, **{"inf-cl": 8.0})
    assert verdicts(entry) == {
        "times as fast as eager": met,
        "times as fast as inf-cl": met,
        "of the matmul rate, 3 product(s)": met,
    }
    assert verdicts(make_entry(256, 512, "forward", ours=ours, matmul=0.4)) == {"of the matmul rate, 1 product(s)": met}
    assert verdicts(make_entry(1024, 128, ours=ours, eager=1.0)) == {}


@pytest.mark.parametrize(("mib", "met"), [(953, True), (954, False)])
def test_the_target_of_memory_is_in_gigabytes(mib, met):
    """1 GB is 953.67 MiB."""
    entry = make_entry(65536, 64, ours={"status": "ok", "extra_mib": mib}, vanilla=1.0, eager={"status": "skipped"})
    assert verdicts(entry)["GB besides inputs and outputs"] is met


def test_an_absent_inf_cl_leaves_its_target_out_and_a_wrong_vanilla_loss_misses_it():
    absent = {"inf-cl": {"status": "skipped"}}
    assert verdicts(make_entry(4096, 128, ours=1.0, vanilla=1.0, eager=9.0, **absent)) == {
        "times as fast as eager": True,
    }
    entry = make_entry(4096, 128, ours=1.0, vanilla={"status": "wrong", "reason": "off"}, eager=9.0, **absent)
    assert verdicts(entry)["times as fast as inf-cl"] is False
    assert gpu_report.problems({"tests": None, "cases": [entry], "not_measured": {}}) == [
        f"{entry['case']}, vanilla wrong: off"
    ]


def test_tables_compare_inf_cl_with_the_vanilla_loss():
    entry = make_entry(4096, 512, ours=2.0, vanilla=1.0, eager=20.0, matmul=0.5, **{"inf-cl": 8.0})
    head, row = gpu_report.op_table([entry]).splitlines()
    assert head.split() == "ms host eager inf-cl % of matmul TFLOP/s MiB ours MiB eager".split()
    assert row.removeprefix(entry["case"]).split() == ["2.000", "10.0", "8.0", "75"]
