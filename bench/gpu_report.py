"""From measurements to words: which targets are met, and the tables that ``bench/gpu.py`` prints last."""

import math
from collections.abc import Callable, Iterator
from typing import Any

from records import OURS, PEERS, TWINS, Record, against, from_cases

Entry = dict[str, Any]  # a case, as the JSON has it

_LARGE, _WIDTH = 8192, 256  # N at least, and D, of targets of vector quantization
OUT_OF_TIME = "out of time"


def competitors(entry: Entry) -> dict[str, Record]:
    return {record.competitor: record for record in from_cases([entry])}


def measured(entry: Entry, name: str, what: str) -> float | None:
    """One of the numbers of a :class:`records.Record`; None where a competitor has none."""
    return getattr(competitors(entry).get(name), what, None)


def speed_up(entry: Entry, ours: str, peer: str) -> float | None:
    """:func:`records.against`; None unless both were measured."""
    value = against(competitors(entry), ours, peer)
    return None if math.isnan(value) else value


# ----------------------------------------------------------------------------------------------------------- targets

_PRODUCTS = 7  # of M x N x D that our forward and backward do, "soft" (docs/kernels.md)
# Largest milliseconds on an H200 of forward and backward at D = 256, by N and whether it is a CUDA graph.
_H200_MS = {(1024, True): 0.12, (8192, False): 0.68, (65536, False): 5.5}


def target(
    case: str, what: str, wanted: float, got: float | None, *, failed: bool = False, at_most: bool = False
) -> list[dict[str, Any]]:
    """The target, met or missed; missed where ours is wrong or fails; none where it, or a peer, has no number."""
    if got is None and not failed:
        return []
    met = got is not None and (got <= wanted if at_most else got >= wanted)
    return [{"case": case, "what": what, "at_most": at_most, "target": wanted, "measured": got, "met": met}]


def evaluate_targets(entries: list[Entry], gpu: str) -> list[dict[str, Any]]:
    """The targets that the measured cases show to be met or missed."""
    return [found for entry in entries for found in _targets_of(entry, gpu)]


def _targets_of(entry: Entry, gpu: str) -> Iterator[dict[str, Any]]:
    part, width, whole = entry["part"], entry["width"], entry["part"] == "forward+backward"
    share, extra = measured(entry, "ours", "share"), measured(entry, "ours", "mib")
    gigabytes = None if extra is None else extra * 2**20 / 1e9

    def add(what: str, wanted: float, got: float | None, at_most: bool = False, ours: str = "ours") -> Any:
        failed = entry["results"].get(ours, {"status": "ok"})["status"] != "ok"
        return target(entry["case"], what, wanted, got, failed=failed, at_most=at_most)

    def faster(peer: str, wanted: float) -> Any:
        return add(f"times as fast as {peer}", wanted, speed_up(entry, "ours", peer), ours=TWINS.get(peer, "ours"))

    if entry["op"] == "weighted_info_nce":
        if whole and entry["length"] >= 4096:
            yield from faster("eager", 8.0)
            yield from faster("inf-cl", 4.0)
        if whole and (entry["length"], width) == (65536, 64):
            yield from add("GB besides inputs and outputs", 1.0, gigabytes, at_most=True)
        if width >= 256:
            yield from add(f"of the matmul rate, {entry['products']} product(s)", 0.4, share)
        return
    codes, graph = entry["codes"], entry["graph"]
    if whole and width <= 64 and not graph:
        yield from faster("eager", 8.0)
        yield from faster("compiled", 3.0)
    if entry["dtype"] == "float32" or width != _WIDTH:
        return
    if part == "assign" and codes >= _LARGE:
        yield from add("of the matmul rate", 0.65, share)
        yield from faster("flash-kmeans", 1.0)
    if part == "forward" and codes >= _LARGE:
        yield from add("of the matmul rate", 0.45, share)
    if whole and codes >= 1024 and not graph:
        yield from faster("compiled", 2.2)
        if entry["codebook_grad"] == "soft":
            rate = None if share is None else share * _PRODUCTS / entry["products"]
            yield from add(f"of the matmul rate, {_PRODUCTS} products", 0.6, rate)
    usual = entry["masked"] and entry["latents"] == "random" and entry["codebook_grad"] == "soft"
    if whole and usual and "H200" in gpu and (codes, graph) in _H200_MS:
        what = "ms under a CUDA graph" if graph else "ms"
        yield from add(what, _H200_MS[codes, graph], measured(entry, "ours", "ms"), at_most=True)
    if whole and codes == 262144:
        yield from add("GB besides inputs and outputs", 2.0, gigabytes, at_most=True)


def step_targets(benchmarks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of the paper's training step with ``--amp --compile``, beside taming-transformers' own."""
    steps = {b["extra_info"]["competitor"]: b for b in benchmarks if b["extra_info"]["op"] == "vqgan"}

    def add(what: str, wanted: float, at_most: bool, names: tuple[str, str], get: Callable[[Entry], float]) -> Any:
        found = [get(steps[name]) for name in names if name in steps]
        got = found[0] / found[1] if len(found) == 2 else None
        return target("training step, amp and compile", what, wanted, got, at_most=at_most)

    def seconds(entry: Entry) -> float:
        return float(entry["stats"]["median"])

    def mib(entry: Entry) -> float:
        return float(entry["extra_info"]["peak_mib"])

    return [
        *add("times as fast as taming's in mixed precision", 3.0, False, ("taming-amp", "amp-compile"), seconds),
        *add("times as fast as taming's", 5.0, False, ("taming", "amp-compile"), seconds),
        *add("of taming's memory", 0.6, True, ("amp-compile", "taming"), mib),
    ]


# ------------------------------------------------------------------------------------------------------------ tables


def format_table(rows: list[list[str]]) -> str:
    """Columns as wide as their widest cell: the first one left, the rest right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _cell(entry: Entry, name: str, value: float | None, form: str) -> str:
    if value is not None:
        return format(value, form)
    return _SHORT.get(entry["results"].get(name, {}).get("status", ""), "")


_SHORT = {"skipped": "-", "out of memory": "OOM", "wrong": "WRONG", "failed": "FAILED"}


def step_table(benchmarks: list[dict[str, Any]]) -> str:
    """Whole steps and priors, which the fused ops are a part of."""
    rows = [["whole steps", "", "ms", "MiB"]]
    for entry in benchmarks:
        info, ms = entry["extra_info"], 1e3 * entry["stats"]["median"]
        rows.append([entry["group"], info["competitor"], f"{ms:.4g}", f"{info.get('peak_mib', 0):.0f}"])
    return format_table(rows)


def op_table(entries: list[Entry]) -> str:
    """Times of ours, how many times as fast it is as each peer, rates, and memory."""
    peers = [name for name in PEERS if any(name in entry["results"] for entry in entries)]
    plain = [name for name in ("ours", "eager", "compiled") if any(name in entry["results"] for entry in entries)]
    head = ["", "ms", "host", *peers, "% of matmul", "TFLOP/s", *(f"MiB {name}" for name in plain)]

    def row(entry: Entry) -> list[str]:
        rate = measured(entry, "ours", "share")
        return [
            entry["case"],
            _cell(entry, "ours", measured(entry, "ours", "ms"), ".3f"),
            _cell(entry, "ours", entry["results"].get("ours", {}).get("host_ms"), ".3f"),
            *(_cell(entry, name, speed_up(entry, "ours", name), ".1f") for name in peers),
            _cell(entry, "ours", None if rate is None else 100 * rate, ".0f"),
            _cell(entry, "ours", measured(entry, "ours", "tflops"), ".0f"),
            *(_cell(entry, name, measured(entry, name, "mib"), ".0f") for name in plain),
        ]

    return format_table([head, *map(row, entries)])


def target_table(targets: list[dict[str, Any]]) -> str:
    rows = [["target", "", "wanted", "measured", ""]]
    for target in targets:
        measured = "-" if target["measured"] is None else f"{target['measured']:.3g}"
        wanted = f"{'<=' if target['at_most'] else '>='} {target['target']:g}"
        rows.append([target["case"], target["what"], wanted, measured, "met" if target["met"] else "MISSED"])
    return format_table(rows)


def problems(report: dict[str, Any]) -> list[str]:
    """What makes the run a failure: failed tests, wrong or failed results of ours. Peers may fail."""
    found = []
    tests = report["tests"]
    if tests and tests["status"] == "failed":
        found.append(f"tests/ops {tests['status']}: {tests['counts']}")
    for entry in report["cases"]:
        for name in OURS:
            result = entry["results"].get(name, {})
            if result.get("status") not in (None, "ok", "skipped"):
                found.append(f"{entry['case']}, {name} {result['status']}: {result.get('reason')}")
    parts = {"compiling the steps": report.get("compilation")} | report.get("parts", {})
    for name, part in parts.items():
        if part and part["status"] == "failed":
            found.append(f"{name} failed: {'; '.join(part['told'])}")
    found += [f"{case}: {reason}" for case, reason in report["not_measured"].items() if reason != OUT_OF_TIME]
    return found


def summary(report: dict[str, Any]) -> str:
    """The end of the output: the tables, the targets, and what went wrong."""
    machine, method, entries = report["machine"], report["method"], report["cases"]
    tests = report["tests"]
    failed = tests is not None and tests["status"] == "failed"
    lines = ["TESTS OF THE OPS FAILED: no speed-up below is to be reported", ""] if failed else []
    lines += [
        f"{machine['gpu']}, driver {machine['driver']}, torch {machine['torch']}, triton {machine['triton']}",
        f"M = {method['rows']}, D = {method['width']}, {100 * method['mask_ratio']:.0f} % of the rows stochastic; "
        f"medians of up to {method['repeats']}, cold L2, launches hidden",
        "ms, host: of ours, and until its call returns; peers: how many times as fast as they ours is",
        "MiB: besides inputs and outputs",
        "% of matmul: of the rate of the plain product of the same size; 8192 x 8192 x 8192 reaches "
        + ", ".join(f"{rate:.0f} TFLOP/s in {dtype}" for dtype, rate in report["matmul_8192_tflops"].items()),
        "vqp: vector-quantize-pytorch, other functions: nearest code without noise, Gumbel noise on every row; in fp32",
        "nearest: our NearestQuantizer, compared with vqp's and taming's",
        "InfoNCE: gradient to the key only; vanilla: ours without weights, compared with inf-cl, which has none",
        "",
    ]
    for op in dict.fromkeys(entry["op"] for entry in entries):
        cases = [entry for entry in entries if entry["op"] == op]
        lines += [op_table(cases), ""]
    if report.get("benchmarks"):
        lines += [step_table(report["benchmarks"]), ""]
    if report["targets"]:
        lines += [target_table(report["targets"]), ""]
    late = [case for case, reason in report["not_measured"].items() if reason == OUT_OF_TIME]
    if late:
        lines.append(f"{OUT_OF_TIME}, not measured: {'; '.join(late)}")
    lines.append("tests/ops: not run" if tests is None else f"tests/ops {tests['status']}: {tests['counts']}")
    return "\n".join(lines + [f"PROBLEM: {problem}" for problem in problems(report)])
