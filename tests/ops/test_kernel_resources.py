"""The schedules' table, and what its tiles cost on every supported GPU: ahead-of-time compilation needs none."""

import itertools
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import kernel_resources
import pytest
import torch
from helpers.kernel_cases import in_a_new_process, without_interpreter
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from regvq_fast import dispatch
from regvq_fast.kernels.assign_codes import assign_codes_forward
from regvq_fast.kernels.vector_quantize import vector_quantize_forward
from regvq_fast.kernels.vector_quantize_backward import vector_quantize_backward
from regvq_fast.kernels.weighted_info_nce import weighted_info_nce_backward, weighted_info_nce_forward

TESTS = str(Path(__file__).parents[1])
CPU = torch.device("cpu")
TYPES = (torch.float32, torch.float16, torch.bfloat16)
ARCHITECTURES = (70, 75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121)

# ------------------------------------------------------------------------------------------------------------- table


@pytest.fixture
def on(monkeypatch):
    """``on(90)``: as if the device were an sm_90."""
    monkeypatch.delenv("REGVQ_SCHEDULE", raising=False)
    return lambda architecture: monkeypatch.setattr(dispatch, "capability", lambda device: architecture)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_schedule_follows_from_the_architecture(architecture, on, monkeypatch):
    on(architecture)
    fused = architecture >= 80
    assert dispatch.is_chunked(CPU) is not fused
    monkeypatch.setenv("REGVQ_SCHEDULE", "chunked")
    assert dispatch.is_chunked(CPU)
    monkeypatch.setenv("REGVQ_SCHEDULE", "fused")
    if fused:
        assert not dispatch.is_chunked(CPU)
    else:
        with pytest.raises(ValueError, match=r"REGVQ_SCHEDULE=fused .*sm_80"):
            dispatch.is_chunked(CPU)


def test_an_unknown_schedule_is_an_error(monkeypatch):
    monkeypatch.setenv("REGVQ_SCHEDULE", "best")
    with pytest.raises(ValueError, match=r"REGVQ_SCHEDULE .*'best'"):
        dispatch.is_chunked(CPU)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_there_is_a_tile_for_everything(architecture, on):
    on(architecture)
    for kernel in dispatch.KERNELS:
        for dtype in TYPES:
            for width in (1, 15, 16, 17, 64, 100, 128, 129, 256, 257, 512, 513, 4096):
                tile = dispatch.pinned_tile(kernel, dtype, width, CPU)
                # tl.dot takes 16 and more of each, tl.arange powers of two; the noise comes in fours of codes.
                assert min(tile.BM, tile.BN, tile.BK) >= 16
                assert all(math.log2(extent).is_integer() for extent in (tile.BM, tile.BN, tile.BK, tile.num_warps))
                assert tile.options()["enable_fp_fusion"] is True
                assert dispatch.chunk_rows(1024) % tile.BM == 0
                if not dispatch.is_chunked(CPU):
                    assert max(16, width) > tile.BK // 2  # no more zeros than channels


@pytest.mark.parametrize("num_codes", [1, 1000, 1024, 16384, 65536, 1_000_000])
def test_chunks_are_whole_tiles_of_a_bounded_number_of_scores(num_codes):
    rows = dispatch.chunk_rows(num_codes)
    assert rows % 128 == 0
    assert rows * num_codes <= max(dispatch.CHUNK_SCORES, dispatch.MIN_CHUNK_ROWS * num_codes)
    assert (
        rows + (128 if rows <= dispatch.ORDER_WINDOW else dispatch.ORDER_WINDOW)
    ) * num_codes > dispatch.CHUNK_SCORES


@pytest.mark.parametrize(
    ("num_codes", "itemsize", "rows"),
    [
        (1024, 2, 32768),  # 2^25 scores
        (8192, 2, 4096),
        (65536, 2, 4096),  # 512 MiB
        (65536, 4, 2048),
        (262144, 2, 1024),
        (1_000_000, 2, 1024),  # 2 KiB a code
        (1_000_000, 4, 512),
    ],
)
def test_chunks_of_the_fused_backward_have_4096_rows_or_512_mib(num_codes, itemsize, rows):
    assert dispatch.fused_backward_rows(num_codes, itemsize) == rows


@settings(deadline=None, derandomize=True, database=None)
@given(
    num_rows=st.integers(1, 100_000),
    num_codes=st.integers(1, 100_000),
    rows_of_a_tile=st.sampled_from((16, 64, 128)),
    codes_of_a_tile=st.sampled_from((32, 64, 128)),
    least=st.sampled_from((64, 256, 2048)),
)
def test_parts_are_whole_tiles_that_cover_the_codes(num_rows, num_codes, rows_of_a_tile, codes_of_a_tile, least):
    tile = dispatch.Tile(rows_of_a_tile, codes_of_a_tile, 64, 4, 2)
    part = dispatch.codes_per_split(num_rows, num_codes, tile, least, CPU)
    assert part == dispatch.codes_per_split(num_rows, num_codes, tile, least, CPU)
    assert part % codes_of_a_tile == 0
    assert min(least, num_codes) <= part < num_codes + codes_of_a_tile  # the last part may have fewer


def test_codes_are_split_only_where_rows_leave_processors_idle():
    tile = dispatch.Tile(64, 64, 64, 4, 2)
    processors = 8  # of what isn't a GPU
    assert dispatch.codes_per_split(64 * processors, 8192, tile, 256, CPU) == 8192
    assert dispatch.codes_per_split(64, 8192, tile, 256, CPU) == 8192 // processors
    assert dispatch.codes_per_split(64, 255, tile, 256, CPU) == 256


def test_where_programs_are_unequal_parts_make_more_waves():
    tile = dispatch.Tile(64, 64, 64, 4, 2)
    processors = 8  # of what isn't a GPU
    assert dispatch.codes_per_split(64 * processors, 8192, tile, 64, CPU, waves=4) == 8192 // 4
    assert dispatch.codes_per_split(64, 8192, tile, 64, CPU, waves=4) == 320  # 29 of 32 programs, in whole tiles
    assert dispatch.codes_per_split(64 * 8 * processors, 8192, tile, 64, CPU, waves=4) == 8192  # they are there already


def test_the_search_for_parts_is_made_once_for_a_kind_of_call():
    tile = dispatch.Tile(64, 64, 64, 4, 2)
    dispatch.codes_per_split(64 * 9, 262144, tile, 256, CPU)
    searched = dispatch._num_splits.cache_info().misses
    dispatch.codes_per_split(64 * 9, 262144, tile, 256, CPU)
    assert dispatch._num_splits.cache_info().misses == searched


@pytest.mark.parametrize("num_codes", [1, 3, 16, 200])
def test_chunks_of_several_windows_are_whole_windows(num_codes):
    most = dispatch.chunk_rows(num_codes)
    assert most > dispatch.ORDER_WINDOW
    for num_rows in (most - 1, most + 1, 5 * most // 2):
        chunk = dispatch.equal_chunks(num_rows, most)
        assert chunk <= most
        assert chunk % dispatch.ORDER_WINDOW == 0 or chunk < dispatch.ORDER_WINDOW


def test_chunks_are_equal_and_no_larger_than_allowed():
    assert dispatch.equal_chunks(10240, 4096) == 3456
    assert dispatch.equal_chunks(0, 4096) == 128
    for num_rows in (1, 127, 129, 4096, 4097, 100_000):
        chunk = dispatch.equal_chunks(num_rows, 4096)
        assert chunk % 128 == 0
        assert chunk <= 4096
        assert -(-num_rows // chunk) == -(-num_rows // 4096)


# --------------------------------------------------------------------------------------------------------- resources

# Types whose kernels are compiled: both of two bytes share their tiles, so each GPU gets one of them.
COMPILED = {70: ("float16", "float32"), 80: ("float16", "float32")} | dict.fromkeys((90, 100), ("bfloat16", "float32"))
# tests/kernel_resources.py with fewer calls: of each kernel, type and tile the one with the most flags.
RESOURCES = f"""
import sys
sys.path.insert(0, sys.argv.pop(1))
import kernel_resources

def thinned(architecture, widths, record_calls=kernel_resources.record_calls):
    chosen = {{}}
    for call in record_calls(architecture, widths):
        if call["type"] not in {COMPILED}[architecture]:
            continue
        names = ("ASSIGN", "LINEAR", "ONE_GROUP", "H", "BM", "BN", "BK")
        constants = call["constants"]
        steps = call["D"] > constants.get("BK", call["D"])  # through the channels, another loop
        key = (call["kernel"], call["type"], str(call["options"]), steps, *map(constants.get, names))
        flags = sum(value is True for value in constants.values())
        if key not in chosen or flags > chosen[key][0]:
            chosen[key] = (flags, call)
    return [call for _, call in chosen.values()]

kernel_resources.record_calls = thinned
sys.exit(kernel_resources.main())
"""
# The kernels of the schedules' table, by their names in the report.
NAMES = {
    "vector_quantize": "vector_quantize_fwd",
    "assign_codes": "vector_quantize_fwd ASSIGN",
    "vector_quantize_backward": "vector_quantize_bwd ONE_GROUP",
    "vector_quantize_backward_heavy": "vector_quantize_bwd LINEAR",
    "weighted_info_nce": "weighted_info_nce_fwd",
    "weighted_info_nce_backward": "weighted_info_nce_bwd",
}


@without_interpreter
@pytest.mark.slow
def test_every_pinned_tile_fits_every_gpu_without_spills_and_on_its_tensor_cores(tmp_path):
    table = str(tmp_path / "table.json")
    widths = ("16", "64", "128", "256", "512")  # the limits of the tiles, and beyond
    command = ("-c", RESOURCES, TESTS, *map(str, COMPILED), "--json", table, "--width", *widths)
    in_a_new_process(*command, TRITON_CACHE_DIR=str(tmp_path / "cache"))
    compiled, multiply = set(), set()
    for row in json.loads(Path(table).read_text()):
        flags = row["flags"].split()
        telling = [flag for flag in ("ASSIGN", "LINEAR") if flag in flags]
        if row["kernel"] == "vector_quantize_bwd" and not telling and "ONE_GROUP" in flags:
            telling = ["ONE_GROUP"]
        name = " ".join([row["kernel"], *telling])
        compiled.add((row["sm"], row["type"], name, row["tile"]))
        if name in NAMES.values() and "HAS_SCORES" not in flags:
            multiply.add((row["sm"], name))
    assert multiply == {(architecture, name) for architecture in (80, 90, 100) for name in NAMES.values()}
    for architecture in COMPILED:
        assert pinned(architecture) <= compiled


@without_interpreter
@pytest.mark.parametrize("architecture", [70, 90])
def test_every_variant_of_a_sweep_and_of_its_join_is_compiled(architecture):
    calls = kernel_resources.record_calls(architecture, (64,))

    def variants(kernel: str, *flags: str) -> list[tuple[bool, ...]]:
        found = (call["constants"] for call in calls if call["kernel"].strip("_") == f"{kernel}_kernel")
        return sorted({tuple(constants[flag] for flag in flags) for constants in found})

    def all_of(*flags: str) -> list[tuple[bool, ...]]:
        """ASSIGN is the first of the sweep's flags, and goes with neither noise nor log-sum-exp."""
        choices = itertools.product((False, True), repeat=len(flags))
        given = (dict(zip(flags, choice, strict=True)) for choice in choices)
        return [
            tuple(flag.values())
            for flag in given
            if not (flag.get("ASSIGN") and (flag.get("NOISE") or flag.get("LSE")))
        ]

    for kernel, flags in {
        "vector_quantize_fwd": ("ASSIGN", "NOISE", "LSE", "SPLIT"),
        "combine_splits": ("ASSIGN", "NOISE", "LSE"),
        "vector_quantize_bwd": ("LINEAR", "NOISE", "ONE_GROUP"),
        "row_gradients": ("NOISE", "SOFT"),
        "weighted_info_nce_fwd": ("WEIGHTED", "SPLIT"),
        "weighted_info_nce_combine": ("WEIGHTED",),
    }.items():
        assert variants(kernel, *flags) == all_of(*flags), kernel


@without_interpreter
@pytest.mark.parametrize("architecture", [70, 90])
def test_another_number_of_rows_or_images_compiles_no_kernel(architecture):
    """Nor does one whose remainder by 16 is another, of which Triton takes notice by default."""

    def vector_quantization(rows: int) -> None:
        x, codes, mask = torch.zeros(rows, 64), torch.zeros(8192, 64), torch.zeros(rows, dtype=torch.bool)
        one, zero = torch.ones(()), torch.tensor(0)
        for masked, groups in itertools.product((mask, None), (1, rows)):
            inputs = dispatch.Inputs(x, codes, None, None, masked, zero, one, one, zero, groups, "soft")
            *_, lse = vector_quantize_forward(inputs, needs_lse=True)
            indices = torch.zeros(rows, dtype=torch.int64)
            vector_quantize_backward(inputs, x, torch.zeros(groups, 8192), indices, lse, True, True)

    def info_nce(images: int) -> None:
        query, weight = torch.zeros(images, 256, 64), torch.zeros(images, 256)
        weighted_info_nce_forward(query, query, weight, 0.07)
        weighted_info_nce_backward(weight, query, query, weight, weight, 0.07, True, True)

    for call, sizes in ((vector_quantization, (300, 301, 304)), (info_nce, (2, 3))):
        compiled = []
        for size in sizes:
            with kernel_resources.recording(architecture) as calls:
                call(size)
            compiled.append({json.dumps(call, sort_keys=True, default=str) for call in calls})
        assert compiled[0]
        assert all(one == compiled[0] for one in compiled[1:])


@without_interpreter
@pytest.mark.parametrize("architecture", [70, 90])
@pytest.mark.parametrize(("linear", "codebook_grad"), [(False, "soft"), (True, "hard")])
def test_heads_take_the_launches_of_one(architecture, linear, codebook_grad):
    def launches(*lead: int) -> list[str]:
        x, codes, mask = torch.zeros(300, *lead, 64), torch.zeros(*lead, 8192, 64), torch.zeros(300, dtype=torch.bool)
        one, zero = torch.ones(()), torch.tensor(0)
        weight = codes if linear else None
        inputs = dispatch.Inputs(x, codes, weight, None, mask, zero, one, one, zero, 3, codebook_grad)
        with (
            kernel_resources.recording(architecture) as calls,
            mock.patch.object(dispatch, "_num_splits", return_value=2),
        ):
            *_, lse = vector_quantize_forward(inputs, needs_lse=True)
            indices = torch.zeros(x.shape[:-1], dtype=torch.int64)
            vector_quantize_backward(inputs, x, torch.zeros(3, *lead, 8192), indices, lse, True, True)
            assign_codes_forward(x, codes)
        return [call["kernel"] for call in calls]

    assert launches(4) == launches()


@without_interpreter
@pytest.mark.parametrize(
    ("architecture", "tile", "loaded", "ahead"),
    [
        (80, dispatch.Tile(64, 32, 64, 4, 3), 4 * 64 / 64, 1),  # rows stay; the third stage is a prefetch
        (80, dispatch.Tile(64, 32, 16, 4, 2), 4 * 64 * (1 / 64 + 1 / 32), 0),  # both operands in steps of 16 channels
        (70, dispatch.Tile(64, 32, 16, 4, 2), 4, "-"),  # reads scores
    ],
)
def test_bytes_a_score_and_tiles_ahead_of_a_sweep(architecture, tile, loaded, ahead, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    x = torch.zeros(256, 64)
    pinned = mock.patch("regvq_fast.kernels.vector_quantize.pinned_tile", return_value=tile)
    with kernel_resources.recording(architecture) as calls, pinned:
        assign_codes_forward(x, x)
    (call,) = (call for call in calls if "vector_quantize_fwd" in call["kernel"])
    row = kernel_resources.compile_call(call | {"sm": architecture, "type": "float32", "D": 64})
    assert row["bytes"] == pytest.approx(loaded + 4 / 64, abs=1e-3)  # and the per-code bias
    assert row["ahead"] == ahead


@without_interpreter
def test_an_architecture_that_nobody_knows_is_named():
    command = [sys.executable, f"{TESTS}/kernel_resources.py", "91"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.search(r"error: .*70, 75, 80, 86, 89, 90, 100, 120.*\b91\n$", done.stderr)


def pinned(architecture: int) -> set[tuple[int, str, str, str]]:
    """The table's tiles for an architecture, as rows of the report."""
    chunked = {kernel: ({None: tile}, {None: tile}) for kernel, tile in dispatch._CHUNKED.items()}
    table = chunked if architecture == 70 else dispatch._FUSED[architecture]
    return {
        (architecture, dtype, NAMES[kernel], f"{tile.BM}x{tile.BN}x{tile.BK} w{tile.num_warps} s{tile.num_stages}")
        for kernel, tiles_by_type in table.items()
        for dtype, tiles in zip(COMPILED[architecture], tiles_by_type, strict=True)
        for tile in tiles.values()
    }
