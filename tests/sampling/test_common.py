"""What the samplers share: nothing is compiled before it is asked for, and a captured step starts where it was."""

import subprocess
import sys

import pytest
import torch

from regvq_fast.sampling.common import capture, compiled


def test_importing_the_samplers_compiles_nothing() -> None:
    code = "import torch; torch.compile = None; import regvq_fast.sampling"  # None: a call fails
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_network_is_wrapped_once() -> None:
    assert compiled(torch.relu) is compiled(torch.relu)
    assert compiled(torch.relu) is not compiled(torch.tanh)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_captured_step_starts_from_what_was_there() -> None:
    index, total = torch.tensor(2, device="cuda"), torch.tensor(10, device="cuda")
    seen = torch.zeros(8, dtype=torch.int64, device="cuda")

    def step() -> None:
        total.add_(index)
        seen.index_copy_(0, index.view(1), total.view(1))
        index.add_(1)

    advance = capture(step, index, total)
    assert (index.item(), total.item()) == (2, 10)
    for _ in range(3):
        advance()
    assert (index.item(), total.item()) == (5, 10 + 2 + 3 + 4)
    assert seen.tolist() == [0, 0, 12, 15, 19, 0, 0, 0]
