"""Every documented error of the ops, each with the value that caused it in its message, before anything is computed."""

import numpy as np
import pytest
import torch

from regvq_fast.ops import assign_codes, segment_sum, softmax_statistics, vector_quantize, weighted_info_nce

SEED = torch.tensor(1)
MASK = torch.ones(6, dtype=torch.bool)
NAN = float("nan")


def with_value(shape, place, value):
    tensor = torch.zeros(shape)
    tensor[place] = value
    return tensor


# Arguments that replace good ones, the error, and what its message must hold.
QUANTIZE = {
    "x is a list": ({"x": [[1.0]]}, TypeError, "x .*list"),
    "x is integer": ({"x": torch.zeros(6, 4, dtype=torch.int64)}, TypeError, "x .*torch.int64"),
    "x is a vector": ({"x": torch.zeros(4)}, ValueError, r"x .*\(4,\)"),
    "x is a number": ({"x": torch.zeros(())}, ValueError, r"x .*\(\)"),
    "codebook is flat": ({"codebook": torch.zeros(4)}, ValueError, r"codebook .*\(4,\)"),
    "codebook has other D": ({"codebook": torch.zeros(5, 3)}, ValueError, r"codebook .*\b4 .*\(5, 3\)"),
    "codebook has no codes": ({"codebook": torch.zeros(0, 4)}, ValueError, r"codebook has no codes.*\(0, 4\)"),
    "no channels": ({"x": torch.zeros(6, 0), "codebook": torch.zeros(5, 0)}, ValueError, r"no channels.*\(5, 0\)"),
    "codebook in another type": (
        {"codebook": torch.zeros(5, 4, dtype=torch.float16)},
        TypeError,
        "codebook .*torch.float16.* torch.float32",
    ),
    "codebook on another device": (
        {"codebook": torch.zeros(5, 4, device="meta")},
        ValueError,
        "codebook .*meta.* cpu",
    ),
    "weight of other shape": ({"weight": torch.zeros(7, 4)}, ValueError, r"weight \(7, 4\) and codebook \(5, 4\)"),
    "weight of other D": ({"weight": torch.zeros(5, 2)}, ValueError, r"weight .*\b4 .*\(5, 2\)"),
    "weight in another type": ({"weight": torch.zeros(5, 4).double()}, TypeError, "weight .*torch.float64"),
    "weight on another device": ({"weight": torch.zeros(5, 4, device="meta")}, ValueError, "weight .*meta"),
    "bias without weight": ({"bias": torch.zeros(5)}, ValueError, "bias .*linear"),
    "bias of other length": (
        {"weight": torch.zeros(5, 4), "bias": torch.zeros(4)},
        ValueError,
        r"bias .*\b5 .*\(4,\)",
    ),
    "bias in another type": (
        {"weight": torch.zeros(5, 4), "bias": torch.zeros(5).bfloat16()},
        TypeError,
        "bias .*torch.bfloat16.* torch.float32",
    ),
    "scale overflows": ({"scale": 2e38}, ValueError, r"float32.*scale"),
    "tau underflows": ({"tau": 1e-39}, ValueError, r"reach .*1 / tau"),
    "codes overflow": ({"codebook": torch.full((5, 4), 1e19)}, ValueError, r"reach 1\.8e\+39"),
    "tau is a word": ({"tau": "a"}, TypeError, "tau .*'a'"),
    "tau is None": ({"tau": None}, TypeError, "tau .*None"),
    "scale is complex": ({"scale": 1j}, TypeError, "scale .*1j"),
    "mask without seed": ({"mask": MASK}, ValueError, "mask .*seed"),
    "mask is a list": ({"mask": [True] * 6, "seed": SEED}, TypeError, "mask .*list"),
    "mask is float": ({"mask": MASK.float(), "seed": SEED}, TypeError, "mask .*bool.* torch.float32"),
    "mask of other shape": (
        {"mask": MASK[:5], "seed": SEED},
        ValueError,
        r"mask .*\(6,\).*\(5,\)",
    ),
    "mask on another device": ({"mask": MASK.to("meta"), "seed": SEED}, ValueError, "mask .*meta.* cpu"),
    "valid is a list": ({"valid": [True] * 6}, TypeError, "valid .*list"),
    "valid is float": ({"valid": MASK.float()}, TypeError, "valid .*bool.* torch.float32"),
    "valid of other shape": ({"valid": MASK[:5]}, ValueError, r"valid .*\(6,\).*\(5,\)"),
    "valid on another device": ({"valid": MASK.to("meta")}, ValueError, "valid .*meta.* cpu"),
    "other heads than the codebook's": (
        {"codebook": torch.zeros(2, 5, 4)},
        ValueError,
        r"codebook \(2, 5, 4\) .*2 heads.*\(6, 4\)",
    ),
    "codebook of four dimensions": ({"codebook": torch.zeros(1, 6, 5, 4)}, ValueError, r"codebook .*\(1, 6, 5, 4\)"),
    "mask with heads": (
        {"x": torch.zeros(3, 6, 4), "codebook": torch.zeros(6, 5, 4), "mask": torch.ones(3, 6).bool(), "seed": SEED},
        ValueError,
        r"mask .*\(3,\).*\(3, 6\)",
    ),
    "weight without heads": (
        {"codebook": torch.zeros(6, 5, 4), "weight": torch.zeros(5, 4)},
        ValueError,
        r"weight .*\(5, 4\)",
    ),
    "bias of other heads": (
        {"codebook": torch.zeros(6, 5, 4), "weight": torch.zeros(6, 5, 4), "bias": torch.zeros(2, 5)},
        ValueError,
        r"bias \(2, 5\) .*\(6, 5, 4\)",
    ),
    "seed is a number": ({"mask": MASK, "seed": 3}, TypeError, r"seed .*int64.*\b3$"),
    "seed has a dimension": ({"mask": MASK, "seed": SEED[None]}, TypeError, r"seed .*tensor\(\[1\]\)"),
    "seed is int32": ({"mask": MASK, "seed": SEED.int()}, TypeError, "seed .*int32"),
    "seed on another device": ({"mask": MASK, "seed": SEED.to("meta")}, ValueError, "seed .*meta.* cpu"),
    "scale 0": ({"scale": 0.0}, ValueError, "scale .*0.0"),
    "scale infinite": ({"scale": float("inf")}, ValueError, "scale .*inf$"),
    "tau of many": ({"tau": torch.ones(6)}, TypeError, "tau .*0-dim"),
    "tau tensor negative": ({"tau": torch.tensor(-1.0)}, ValueError, "tau .*-1"),
    "row_offset of many": (
        {"row_offset": torch.zeros(2, dtype=torch.int64)},
        TypeError,
        "row_offset .*0-dim",
    ),
    "scale trains": (
        {"scale": torch.nn.Parameter(torch.tensor(2.0))},
        TypeError,
        "scale .*gradient",
    ),
    "scale tensor 0": ({"scale": torch.tensor(0.0)}, ValueError, r"scale .*\b0\b"),
    "tau trains": ({"tau": torch.nn.Parameter(torch.tensor(0.5))}, TypeError, "tau .*gradient"),
    "row_offset is a fraction": ({"row_offset": 1.5}, TypeError, r"row_offset .*int64.*1\.5"),
    "row_offset is int32": ({"row_offset": torch.tensor(3).int()}, TypeError, "row_offset .*int32"),
    "row_offset beyond int64": ({"row_offset": 2**63}, ValueError, f"row_offset .*int64.*{2**63}"),
    "groups is a fraction": ({"groups": 2.0}, TypeError, "groups .*int.* 2.0"),
    "groups is None": ({"groups": None}, TypeError, "groups .*int.* None"),
    "scale nan": ({"scale": NAN}, ValueError, "scale .*nan"),
    "tau 0": ({"tau": 0.0}, ValueError, "tau .*0.0"),
    "tau negative": ({"tau": -0.5}, ValueError, "tau .*-0.5"),
    "tau nan": ({"tau": NAN}, ValueError, "tau .*nan"),
    "groups 0": ({"groups": 0}, ValueError, r"groups .*\b0$"),
    "more groups than rows": ({"groups": 7}, ValueError, "groups=7, rows=6"),
    "groups that don't divide": ({"groups": 4}, ValueError, "groups=4, rows=6"),
    "unknown codebook_grad": ({"codebook_grad": "firm"}, ValueError, "codebook_grad .*'firm'"),
    "unknown impl": ({"impl": "cuda"}, ValueError, "impl .*'cuda'"),
    "impl triton": ({"impl": "triton"}, ValueError, "impl='triton' .*cpu.*TRITON_INTERPRET=1"),
    "nan in x": ({"x": with_value((6, 4), (2, 3), NAN)}, ValueError, r"x has 1 .*nan at \(2, 3\)"),
    "inf in codebook": (
        {"codebook": with_value((5, 4), (slice(1, 3), 2), float("inf"))},
        ValueError,
        r"codebook has 2 .*inf at \(1, 2\)",
    ),
    "nan in weight": ({"weight": with_value((5, 4), (4, 0), NAN)}, ValueError, r"weight has 1 .*nan at \(4, 0\)"),
    "-inf in bias": (
        {"weight": torch.zeros(5, 4), "bias": with_value((5,), 3, -float("inf"))},
        ValueError,
        r"bias has 1 .*-inf at \(3,\)",
    ),
}


@pytest.mark.parametrize("case", QUANTIZE)
def test_vector_quantize_names_what_is_wrong(case):
    changed, error, message = QUANTIZE[case]
    with pytest.raises(error, match=message):
        vector_quantize(**{"x": torch.zeros(6, 4), "codebook": torch.zeros(5, 4)} | changed)


ASSIGN = {
    "other heads than the codebook's": ({"codebook": torch.zeros(2, 5, 4)}, ValueError, r"2 heads.*\(6, 4\)"),
    "x is a list": ({"x": [[1.0]]}, TypeError, "x .*list"),
    "x is integer": ({"x": torch.zeros(6, 4, dtype=torch.int32)}, TypeError, "x .*torch.int32"),
    "codebook has other D": ({"codebook": torch.zeros(5, 3)}, ValueError, r"codebook .*\b4 .*\(5, 3\)"),
    "codebook has no codes": ({"codebook": torch.zeros(0, 4)}, ValueError, r"codebook has no codes.*\(0, 4\)"),
    "no channels": ({"x": torch.zeros(6, 0), "codebook": torch.zeros(5, 0)}, ValueError, r"no channels.*\(5, 0\)"),
    "codebook in another type": ({"codebook": torch.zeros(5, 4).half()}, TypeError, "codebook .*torch.float16"),
    "codebook on another device": ({"codebook": torch.zeros(5, 4, device="meta")}, ValueError, "codebook .*meta"),
    "unknown impl": ({"impl": ""}, ValueError, "impl .*''"),
    "impl triton": ({"impl": "triton"}, ValueError, "impl='triton' .*cpu.*TRITON_INTERPRET=1"),
    "nan in x": ({"x": with_value((6, 4), (5, 1), NAN)}, ValueError, r"x has 1 .*nan at \(5, 1\)"),
    "codes overflow": ({"codebook": torch.full((5, 4), 1e19)}, ValueError, r"reach 4\.0e\+38"),
    "nan in codebook": ({"codebook": with_value((5, 4), (0, 1), NAN)}, ValueError, r"codebook has 1 .*nan at \(0, 1\)"),
}


@pytest.mark.parametrize("case", ASSIGN)
def test_assign_codes_names_what_is_wrong(case):
    changed, error, message = ASSIGN[case]
    with pytest.raises(error, match=message):
        assign_codes(**{"x": torch.zeros(6, 4), "codebook": torch.zeros(5, 4)} | changed)


CONTRAST = {
    "query is a list": ({"query": [1.0]}, TypeError, "query .*list"),
    "query is integer": (
        {"query": torch.zeros(2, 3, 4, dtype=torch.int64)},
        TypeError,
        "query .*int64",
    ),
    "query is flat": ({"query": torch.zeros(3, 4)}, ValueError, r"query .*\(3, 4\)"),
    "other shapes": ({"key": torch.zeros(2, 5, 4)}, ValueError, r"query \(2, 3, 4\) and key \(2, 5, 4\)"),
    "key in another type": ({"key": torch.zeros(2, 3, 4).half()}, TypeError, "key .*torch.float16"),
    "key on another device": ({"key": torch.zeros(2, 3, 4, device="meta")}, ValueError, "key .*meta"),
    "weight is integer": ({"weight": torch.ones(2, 3, dtype=torch.int64)}, TypeError, "weight .*int64"),
    "weight of other shape": ({"weight": torch.ones(3, 2)}, ValueError, r"weight .*\(2, 3\), got \(3, 2\)"),
    "weight on another device": ({"weight": torch.ones(2, 3, device="meta")}, ValueError, "weight .*meta"),
    "weight negative": ({"weight": with_value((2, 3), (1, 1), -0.25)}, ValueError, r"negative.*-0\.25"),
    "tau is a tensor": ({"tau": torch.tensor(0.1)}, TypeError, "tau .*gradient.*Tensor"),
    "tau 0": ({"tau": 0}, ValueError, r"tau .*\b0$"),
    "tau negative": ({"tau": -1.0}, ValueError, "tau .*-1.0"),
    "unknown impl": ({"impl": "fast"}, ValueError, "impl .*'fast'"),
    "impl triton": ({"impl": "triton"}, ValueError, "impl='triton' .*cpu.*TRITON_INTERPRET=1"),
    "tau underflows": ({"tau": 1e-39}, ValueError, r"reach 1\.0e\+39.*1 / tau"),
    "tau is a word": ({"tau": "a"}, TypeError, "tau .*'a'"),
    "nan in query": ({"query": with_value((2, 3, 4), (1, 2, 0), NAN)}, ValueError, r"query has 1 .*nan at \(1, 2, 0\)"),
    "inf in key": (
        {"key": with_value((2, 3, 4), (0, 0, 3), float("inf"))},
        ValueError,
        r"key has 1 .*inf at \(0, 0, 3\)",
    ),
    "nan in weight": ({"weight": with_value((2, 3), (0, 2), NAN)}, ValueError, r"weight has 1 .*nan at \(0, 2\)"),
}


@pytest.mark.parametrize("case", CONTRAST)
def test_weighted_info_nce_names_what_is_wrong(case):
    changed, error, message = CONTRAST[case]
    with pytest.raises(error, match=message):
        weighted_info_nce(**{"query": torch.zeros(2, 3, 4), "key": torch.zeros(2, 3, 4)} | changed)


STATISTICS = {
    "x is integer": ({"x": torch.zeros(6, 4, dtype=torch.int64)}, TypeError, "x .*torch.int64"),
    "no rows": ({"x": torch.zeros(0, 4)}, ValueError, r"x and weight .*\(0, 4\) and \(5, 4\)"),
    "no codes": ({"weight": torch.zeros(0, 4)}, ValueError, r"x and weight .*\(6, 4\) and \(0, 4\)"),
    "valid of other shape": ({"valid": MASK[:5]}, ValueError, r"valid .*\(6,\).*\(5,\)"),
    "weight has other D": ({"weight": torch.zeros(5, 3)}, ValueError, r"weight .*\b4 .*\(5, 3\)"),
    "weight in another type": ({"weight": torch.zeros(5, 4).half()}, TypeError, "weight .*torch.float16"),
    "bias of other length": ({"bias": torch.zeros(4)}, ValueError, r"bias .*\b5 .*\(4,\)"),
    "temperature 0": ({"temperature": 0.0}, ValueError, "temperature .*0.0"),
    "temperature underflows": ({"temperature": 1e-39}, ValueError, r"reach .*1 / temperature"),
    "nan in weight": ({"weight": with_value((5, 4), (0, 1), NAN)}, ValueError, r"weight has 1 .*nan at \(0, 1\)"),
    "temperature is a tensor": ({"temperature": torch.tensor(1.0)}, TypeError, "temperature .*number"),
}


@pytest.mark.parametrize("case", STATISTICS)
def test_softmax_statistics_names_what_is_wrong(case):
    changed, error, message = STATISTICS[case]
    with pytest.raises(error, match=message):
        softmax_statistics(**{"x": torch.zeros(6, 4), "weight": torch.zeros(5, 4)} | changed)


SUM = {
    "values are a list": ({"values": [[1.0]]}, TypeError, "values .*list"),
    "values are integer": ({"values": torch.ones(3, 2).int()}, TypeError, "values .*int32"),
    "values are flat": ({"values": torch.ones(3)}, ValueError, r"values .*\(3,\)"),
    "indices are a list": ({"indices": [0, 1, 2]}, TypeError, "indices .*int64.* list"),
    "indices are int32": ({"indices": torch.ones(3).int()}, TypeError, "indices .*int64.* torch.int32"),
    "too few indices": ({"indices": torch.tensor([0, 1])}, ValueError, r"indices .*\(3,\).*got \(2,\)"),
    "indices elsewhere": (
        {"indices": torch.ones(3, dtype=torch.int64, device="meta")},
        ValueError,
        "indices .*meta.* cpu",
    ),
    "index too large": ({"indices": torch.tensor([0, 4, 1])}, ValueError, r"indices .*\[0, 4\).* 0 to 4"),
    "index negative": ({"indices": torch.tensor([0, -1, 1])}, ValueError, r"indices .*\[0, 4\).* -1 to 1"),
    "segments are a fraction": ({"num_segments": 2.0}, TypeError, "num_segments .*int.* 2.0"),
    "segments negative": ({"num_segments": -1}, ValueError, "num_segments .*-1$"),
    "unknown impl": ({"impl": "fast"}, ValueError, "impl .*'fast'"),
}


@pytest.mark.parametrize("case", SUM)
def test_segment_sum_names_what_is_wrong(case):
    changed, error, message = SUM[case]
    with pytest.raises(error, match=message):
        segment_sum(**{"values": torch.ones(3, 2), "indices": torch.arange(3), "num_segments": 4} | changed)


def test_whole_numbers_may_be_numpys():
    x, codebook = torch.randn(6, 4), torch.randn(5, 4)
    noise = {"mask": MASK, "seed": SEED}
    given = vector_quantize(x, codebook, row_offset=np.int64(3), groups=np.int32(2), **noise)
    assert all(map(torch.equal, given, vector_quantize(x, codebook, row_offset=3, groups=2, **noise)))
    assert segment_sum(x, torch.arange(6), np.int64(6)).equal(x)


def test_under_autocast_types_may_differ_but_fp64_needs_fp64():
    with torch.autocast("cpu", torch.bfloat16):
        assert vector_quantize(torch.zeros(6, 4).half(), torch.zeros(5, 4)).quantized.dtype == torch.float32
        with pytest.raises(TypeError, match=r"codebook .*torch\.float64.* torch\.float32"):
            vector_quantize(torch.zeros(6, 4), torch.zeros(5, 4).double())
