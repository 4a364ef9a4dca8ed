"""Numbers that several kernels share, on the host and on the device."""

import math

import triton
import triton.language as tl

# Kernels keep scores in units of log 2, where exp and log are one instruction each.
LOG2_E = math.log2(math.e)
LN_2 = tl.constexpr(math.log(2))

# In fp16 probabilities are kept times this: fp16 has no room for those under 1e-7.
FP16_SCALE = 2.0**15

# Triton's interpreter knows no inline assembly, and takes a bfloat16 operand of tl.dot for an integer.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
