"""Eager scores are products in fp32, whatever float32 matmul precision the process has chosen for CUDA."""

import contextlib
import sys
import threading
from collections.abc import Iterator

import pytest
import torch

from regvq_fast.matmul import without_tf32
from regvq_fast.ops import assign_codes, softmax_statistics, vector_quantize, weighted_info_nce

X, KEYS = torch.randn(20, 4), torch.randn(6, 4)
CALLS = {
    "assign_codes": lambda: assign_codes(X, KEYS),
    "softmax_statistics": lambda: softmax_statistics(X, KEYS, temperature=0.01),
    "vector_quantize_fallback": lambda: vector_quantize(X, KEYS),
    "weighted_info_nce": lambda: weighted_info_nce(X[None], X[None]),
}


@pytest.mark.parametrize("op", CALLS)
def test_scores_are_multiplied_without_tf32(op, monkeypatch):
    guarded, products = [], []

    @contextlib.contextmanager
    def guard(device):
        guarded.append(device)
        yield
        guarded.pop()

    monkeypatch.setattr(sys.modules[f"regvq_fast.ops.{op}"], "without_tf32", guard)

    def watched(multiply):
        return lambda *args, **options: products.append(list(guarded)) or multiply(*args, **options)

    for name in ("addmm", "bmm", "mm"):
        monkeypatch.setattr(torch, name, watched(getattr(torch, name)))
    CALLS[op]()
    assert products == [[torch.device("cpu")]]


@pytest.fixture
def matmul() -> Iterator[object]:
    """The setting of CUDA's products, which a process without a GPU has, too."""
    yield torch.backends.cuda.matmul
    torch.backends.fp32_precision = torch.backends.cuda.matmul.fp32_precision = "none"


def test_a_precision_that_was_chosen_for_all_backends_stays_theirs(matmul):
    torch.backends.fp32_precision = "tf32"
    with without_tf32(torch.device("cuda")):
        assert matmul.fp32_precision == "ieee"
    assert matmul.fp32_precision == "tf32"
    torch.backends.fp32_precision = "ieee"
    assert matmul.fp32_precision == "ieee", "it follows the process's setting as before"


def test_a_precision_that_was_chosen_for_products_is_chosen_again(matmul):
    matmul.fp32_precision = "tf32"
    with without_tf32(torch.device("cuda")):
        assert matmul.fp32_precision == "ieee"
    assert matmul.fp32_precision == "tf32"


def test_the_precision_comes_back_after_the_last_of_several_threads(matmul):
    matmul.fp32_precision = "tf32"
    entered, may_leave = threading.Event(), threading.Event()

    def second() -> None:
        with without_tf32(torch.device("cuda")):
            entered.set()
            may_leave.wait(10)

    thread = threading.Thread(target=second)
    with without_tf32(torch.device("cuda")):
        thread.start()
        assert entered.wait(10)
    while_second_is_inside = matmul.fp32_precision
    may_leave.set()
    thread.join()
    assert (while_second_is_inside, matmul.fp32_precision) == ("ieee", "tf32")
