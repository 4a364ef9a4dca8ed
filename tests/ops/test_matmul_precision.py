"""Eager scores are products in fp32, whatever float32 matmul precision the process has chosen for CUDA."""

import contextlib
import sys

import pytest
import torch

from regvq_fast.ops import assign_codes, softmax_statistics, vector_quantize, weighted_info_nce

X, KEYS = torch.randn(20, 4), torch.randn(6, 4)
CALLS = {
    "assign_codes": lambda: assign_codes(X, KEYS),
    "softmax_statistics": lambda: softmax_statistics(X, KEYS, temperature=0.01),
    "vector_quantize_eager": lambda: vector_quantize(X, KEYS),
    "weighted_info_nce": lambda: weighted_info_nce(X[None], X[None]),
}


@pytest.mark.parametrize("op", CALLS)
def test_scores_are_multiplied_without_tf32(op, monkeypatch):
    guarded, products = [], []

    @contextlib.contextmanager
    def without_tf32(device):
        guarded.append(device)
        yield
        guarded.pop()

    monkeypatch.setattr(sys.modules[f"regvq_fast.ops.{op}"], "without_tf32", without_tf32)

    def watched(multiply):
        return lambda *args, **options: products.append(list(guarded)) or multiply(*args, **options)

    for name in ("addmm", "bmm"):
        monkeypatch.setattr(torch, name, watched(getattr(torch, name)))
    CALLS[op]()
    assert products == [[torch.device("cpu")]]
