"""The Triton noise against the eager one; without a GPU in Triton's interpreter."""

import math
from pathlib import Path

import pytest
import torch
from helpers.kernel_cases import (
    DEVICE,
    if_kernels_are_elsewhere,
    in_a_new_process,
    needs_kernels,
    pass_in_the_interpreter,
    without_interpreter,
)

from regvq_fast.ops.noise import gumbel_noise, philox4x32

pytest.importorskip("triton")

# The GPU's lg2.approx is within 2^-22; the interpreter's logarithms are exact to the last bits.
TOLERANCE = (4 if DEVICE == "cpu" else 8) * torch.finfo(torch.float32).eps

COMPILE = """
import re
import subprocess
import sys
import tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, sys.argv.pop(1))
from helpers.noise_kernel import CONFIG, gumbel_noise_kernel

types = {"seed_ptr": "*i64", "rows_ptr": "*i64", "out_ptr": "*fp32", "num_rows": "i32", "num_codes": "i32"}
constants = {"WORDS": False, "BM": CONFIG["BM"], "BN": CONFIG["BN"]}
for capability in map(int, sys.argv[1:]):
    source = ASTSource(gumbel_noise_kernel, types, constants)
    compiled = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": CONFIG["num_warps"]}
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = re.search(r"STACK:(\\d+).*LOCAL:(\\d+)", usage)
    assert used, usage
    assert used.groups() == ("0", "0"), f"sm_{capability} spills registers: {usage}"
"""


@if_kernels_are_elsewhere
def test_this_file_passes_in_the_interpreter():
    pass_in_the_interpreter(__file__)


@without_interpreter
def test_it_compiles_for_every_supported_gpu_without_spills(tmp_path):
    in_a_new_process(
        "-c", COMPILE, str(Path(__file__).parents[1]), "70", "80", "90", "100", TRITON_CACHE_DIR=str(tmp_path)
    )


def eager_words(seed: torch.Tensor, rows: torch.Tensor, num_codes: int) -> torch.Tensor:
    blocks = torch.arange((num_codes + 3) // 4)[None]
    low = rows & 0xFFFFFFFF
    words = philox4x32(blocks, (rows >> 32)[:, None], low[:, None], torch.zeros(1, 1, dtype=torch.int64), seed)
    return torch.stack(words, -1).flatten(1)[:, :num_codes]


# Ragged in rows and codes, not a multiple of 4, one code, several tiles; rows in any order and beyond 2^32.
CASES = {
    "one tile": (7, torch.arange(16), 128),
    "ragged": (-3, torch.arange(37) * 3, 261),
    "one code": (2**63 - 1, torch.arange(5), 1),
    "three codes": (-(2**63), torch.tensor([4, 0, 4]), 3),
    "far rows": (0x0123456789ABCDEF, torch.tensor([2**32 - 1, 2**32, 5, 2**33 + 17, 2**62]), 130),
}


@needs_kernels
@pytest.mark.parametrize("case", CASES)
def test_words_equal_the_eager_ones_bit_for_bit(case):
    from helpers import noise_kernel as kernel

    seed, rows, num_codes = CASES[case]
    seed = torch.tensor(seed)
    words = torch.full((len(rows), num_codes), -1, dtype=torch.int64, device=DEVICE)
    kernel.gumbel_noise(seed.to(DEVICE), rows.to(DEVICE), num_codes, words)
    assert torch.equal(words.cpu(), eager_words(seed, rows, num_codes))


@needs_kernels
@pytest.mark.parametrize("case", CASES)
def test_noise_is_within_a_few_ulps_of_the_eager_one_and_fills_every_element(case):
    from helpers import noise_kernel as kernel

    seed, rows, num_codes = CASES[case]
    seed = torch.tensor(seed)
    out = torch.full((len(rows) + 1, num_codes), float("nan"), device=DEVICE)  # a row more, that must stay untouched
    kernel.gumbel_noise(seed.to(DEVICE), rows.to(DEVICE), num_codes, out[:-1])
    expected = gumbel_noise(seed, rows, num_codes)
    error = (out[:-1].cpu() - expected).abs() / expected.abs().clamp(min=1)
    assert error.max() <= TOLERANCE
    assert out[-1].isnan().all()


@needs_kernels
def test_the_whole_range_of_words_gives_accurate_finite_noise():
    import triton
    import triton.language as tl

    from regvq_fast.kernels.noise import gumbel_from_words

    @triton.jit
    def transform(words_ptr, out_ptr, SIZE: tl.constexpr, from_words: tl.constexpr):
        place = tl.arange(0, SIZE)
        tl.store(out_ptr + place, from_words(tl.load(words_ptr + place).to(tl.uint32)))

    size = 1 << 14
    words = torch.cat([torch.arange(8), 2**32 - 1 - torch.arange(8), (1 << 30) + torch.arange(-8, 8)])
    spread = (torch.logspace(0, 32, size - len(words), base=2, dtype=torch.float64) - 1).long()
    words = torch.cat([words, spread.clamp(max=2**32 - 1)])
    out = torch.full((size,), float("nan"), device=DEVICE)
    transform[(1,)](words.to(DEVICE), out, SIZE=size, from_words=gumbel_from_words)
    # The truth of the uniform that fp32 holds: the rounding of the word is eager's as well.
    v = ((words.float() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24).double()
    truth = -torch.log(-torch.log1p(-v))
    error = (out.cpu().double() * math.log(2) - truth).abs() / truth.abs().clamp(min=1)
    assert error.max() <= TOLERANCE
