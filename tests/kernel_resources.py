"""Compile every kernel for every supported GPU, at every pinned tile, without one: registers, shared memory, spills.

    python tests/kernel_resources.py                    all architectures, a table
    python tests/kernel_resources.py 80 90 --width 256  some of them, one number of channels

The calls are those that the launchers make: they run here on small CPU tensors, with the launches recorded instead of
made. Exits with 1 if a kernel spills registers, needs more shared memory than the GPU has, multiplies without the
tensor cores from sm_80 on, or multiplies at all below. Of the kernels that sweep codes or keys, ``bytes`` is what they
load from L2 or global memory for each score (see `bytes_per_score`), writes and loads before the sweep aside; ``ahead``
is how many whole tiles are computed between the issue of a load of codes and the wait for it: num_stages = 2 gives 0,
no prefetch, and 3 gives 1; on sm_100 with D <= BK the product itself also runs one tile ahead of its use.
"""

import argparse
import concurrent.futures
import contextlib
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

ARCHITECTURES = (70, 80, 86, 90, 100)
WIDTHS = (16, 32, 64, 128, 256, 512)
# Shared memory that a program can have, bytes (CUDA C++ programming guide, compute capabilities).
SHARED_LIMIT = {70: 98304, 75: 65536, 80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
TENSOR_CORE = {90: "wgmma.mma_async", 100: "tcgen05.mma"}  # others: mma.sync
COLUMNS = "kernel sm type D flags tile registers shared spills bytes ahead".split()

# A kernel, the types of its arguments, its constants, attributes and options: what one compilation takes.
Call = dict[str, Any]


@contextlib.contextmanager
def recording(architecture: int) -> Iterator[list[Call]]:
    """Describe the kernels that are launched meanwhile, for an architecture, instead of launching them."""
    from triton.runtime.jit import JITFunction

    from regvq_fast import dispatch

    calls: list[Call] = []

    def record(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        calls.append(describe(kernel, args, options))

    capability = mock.patch.object(dispatch, "capability", return_value=architecture)
    with mock.patch.object(JITFunction, "run", record), capability:
        yield calls


def record_calls(architecture: int, widths: tuple[int, ...]) -> list[Call]:
    """The distinct kernel calls that the ops make on an architecture."""
    import torch

    from regvq_fast import dispatch
    from regvq_fast.kernels import assign_codes, vector_quantize, vector_quantize_backward, weighted_info_nce

    calls: dict[str, Call] = {}

    def splits(number: int) -> Any:
        """So many splits of codes and keys, whatever the tile and the GPU."""
        return mock.patch.object(dispatch, "_num_splits", return_value=number)

    types = (torch.float16, torch.float32) + ((torch.bfloat16,) if architecture >= 80 else ())
    for dtype, width in itertools.product(types, widths):
        rows, codes = 256, 8192
        x, codebook = torch.zeros(rows, width, dtype=dtype), torch.zeros(codes, width, dtype=dtype)
        mask, seed, zero = torch.zeros(rows, dtype=torch.bool), torch.tensor(0), torch.tensor(0)
        tau = torch.ones((), dtype=torch.float64)
        indices, lse = torch.zeros(rows, dtype=torch.int64), torch.zeros(rows)
        query, weights = torch.zeros(1, 256, width, dtype=dtype), torch.zeros(1, 256)
        inputs = dispatch.Inputs(x, codebook, None, None, None, seed, tau, tau, zero, 1, "soft")
        heads = inputs._replace(x=x.view(rows // 4, 4, width), codebook=codebook.view(4, codes // 4, width))
        heads = heads._replace(mask=mask[: rows // 4], valid=mask[: rows // 4])
        with recording(architecture) as recorded:
            for number in (2, 1):
                with splits(number):
                    for masked, needs_lse in itertools.product((mask, None), (True, False)):
                        vector_quantize.vector_quantize_forward(inputs._replace(mask=masked), needs_lse)
                    assign_codes.assign_codes_forward(x, codebook)
                    vector_quantize.vector_quantize_forward(heads, True)
                    for weight in (weights, None):
                        weighted_info_nce.weighted_info_nce_forward(query, query, weight, 0.07)
            with splits(2):
                kinds = ((None, "soft"), (None, "hard"), (codebook, "hard"))
                for masked, groups, (linear, codebook_grad) in itertools.product((mask, None), (1, 4), kinds):
                    case = inputs._replace(mask=masked, groups=groups, weight=linear, codebook_grad=codebook_grad)
                    vector_quantize_backward.vector_quantize_backward(
                        case, x, torch.zeros(groups, codes), indices, lse, True, True
                    )
                vector_quantize_backward.vector_quantize_backward(
                    heads, heads.x, torch.zeros(1, 4, codes // 4), indices.view(-1, 4), lse.view(-1, 4), True, True
                )
                weighted_info_nce.weighted_info_nce_backward(
                    weights, query, query, weights, weights, 0.07, False, False
                )
        labels = {"sm": architecture, "type": str(dtype).removeprefix("torch."), "D": width}
        for call in recorded:
            calls.setdefault(json.dumps(call | labels, sort_keys=True, default=str), call | labels)
    return list(calls.values())


def describe(kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Call:
    """A launch as Triton would specialise it: types, constants, what is a multiple of 16."""
    import torch
    from triton.runtime.jit import mangle_type

    values = dict(zip(kernel.arg_names, args, strict=False)) | {
        name: value for name, value in options.items() if name in kernel.arg_names
    }
    types, constants, aligned = {}, {}, []
    for position, parameter in enumerate(kernel.params):
        name, specialized = parameter.name, not parameter.do_not_specialize
        value = values[name]
        if parameter.is_constexpr or value is None or (specialized and type(value) is int and value == 1):
            types[name], constants[name] = "constexpr", value
            continue
        types[name] = mangle_type(value)
        if specialized and (isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0)):
            aligned.append(position)
    return {
        "module": kernel.fn.__module__,
        "kernel": kernel.fn.__name__,
        "types": types,
        "constants": constants,
        "aligned": aligned,
        "options": {name: value for name, value in options.items() if name not in kernel.arg_names},
    }


def compile_call(call: Call) -> dict[str, Any]:
    """One row of the table, and what is wrong with it."""
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(call["module"]), call["kernel"])
    attributes = {(position,): [["tt.divisibility", 16]] for position in call["aligned"]}
    source = ASTSource(kernel, call["types"], call["constants"], attributes)
    architecture = call["sm"]
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=call["options"])
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = re.search(r"REG:(\d+) STACK:(\d+).*LOCAL:(\d+)", usage)
    assert used, usage
    registers, stack, local = map(int, used.groups())
    shared, ptx = compiled.metadata.shared, compiled.asm["ptx"]
    constants = call["constants"]
    tile = "x".join(str(constants[name]) for name in ("BM", "BN", "BK") if name in constants)
    flags = [name for name, value in constants.items() if value is True and name.isupper()]
    problems = []
    if stack or local:
        problems.append(f"spills {stack + local} bytes")
    if shared > SHARED_LIMIT[architecture]:
        problems.append(f"{shared} bytes of shared memory, {SHARED_LIMIT[architecture]} are there")
    multiplies = not constants.get("HAS_SCORES", True)
    if multiplies and architecture < 80:
        problems.append("a product of its own below sm_80")
    if multiplies and architecture >= 80 and TENSOR_CORE.get(architecture, "mma.sync") not in ptx:
        problems.append("no tensor-core instruction")
    return {
        "kernel": call["kernel"].strip("_").removesuffix("_kernel"),
        "sm": architecture,
        "type": call["type"],
        "D": call["D"],
        "flags": " ".join(flags),
        "tile": f"{tile} w{call['options']['num_warps']} s{call['options'].get('num_stages', 3)}",
        "registers": registers,
        "shared": shared,
        "spills": stack + local,
        "bytes": bytes_per_score(call),
        "ahead": tiles_ahead(compiled.asm["ttgir"]),
        "problems": problems,
    }


def bytes_per_score(call: Call) -> float | str:
    """Return the bytes that a sweep loads for each score of a tile of BM x BN.

    With s bytes a channel, a tile of rows that stays (D <= BK) costs D s / BM for the codes, twice that for a backward
    of linear logits; one that goes through in steps costs D s (1 / BM + 1 / BN) a product, of which the backward of
    ``vector_quantize`` has two. Where HAS_SCORES, fp32 products are read in place of that. ``vector_quantize`` adds the
    per-code bias, its posterior's gradient one number a code and group.
    """
    c = call["constants"]
    if "HAS_SCORES" not in c:
        return "-"
    backward = "vector_quantize_bwd" in call["kernel"]
    channels = call["D"] * (4 if call["type"] == "float32" else 2)
    if c["HAS_SCORES"]:
        loaded = 4.0 * (1 + backward)
    elif call["D"] <= c["BK"]:
        loaded = channels * (1 + c.get("LINEAR", False)) / c["BM"]
    else:
        loaded = channels * (1 + backward) * (1 / c["BM"] + 1 / c["BN"])
    if "vector_quantize" in call["kernel"]:
        loaded += 4 / c["BM"]
    if c.get("POSTERIOR"):
        loaded += 4 / c["BM"] if c["ONE_GROUP"] else 4
    return round(loaded, 3)


def tiles_ahead(ttgir: str) -> int | str:
    """Return how many whole tiles are computed between a load and the wait for it, from Triton's GPU dialect."""
    # A loop's wait names its copies, leaves those of later tiles in flight, and comes before the tile's own copies.
    waits = re.findall(r"ttg\.async_wait %[^{]*\{num = (\d+)(.*?)(?=ttg\.async_wait|\Z)", ttgir, re.DOTALL)
    groups = [(int(pending), after.count("ttg.async_commit_group")) for pending, after in waits]
    return min((pending // copies for pending, copies in groups if copies), default="-")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = ", ".join(map(str, SHARED_LIMIT))
    parser.add_argument(
        "architectures", nargs="*", type=int, default=list(ARCHITECTURES), metavar="SM", help=f"of {known}"
    )
    parser.add_argument("--width", type=int, nargs="*", default=list(WIDTHS), help="channels, D")
    parser.add_argument("--kernel", default="", help="only kernels with this in their name")
    parser.add_argument("--json", type=Path, help="write the table here as well")
    arguments = parser.parse_args()
    if unknown := set(arguments.architectures) - SHARED_LIMIT.keys():
        parser.error(f"SM must be of {known}, got {', '.join(map(str, sorted(unknown)))}")
    os.environ.pop("TRITON_INTERPRET", None)
    calls = [
        call
        for architecture in arguments.architectures
        for call in record_calls(architecture, tuple(arguments.width))
        if arguments.kernel in call["kernel"]
    ]
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count()) as pool:
        rows = list(pool.map(compile_call, calls))
    widths = {name: max(len(name), *(len(str(row[name])) for row in rows)) for name in COLUMNS}
    print("  ".join(name.ljust(widths[name]) for name in COLUMNS))
    for row in rows:
        print("  ".join(str(row[name]).ljust(widths[name]) for name in COLUMNS), *row["problems"], sep="  ")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    bad = [row for row in rows if row["problems"]]
    print(f"{len(rows)} compilations, {len(bad)} with problems")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
