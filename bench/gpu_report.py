"""From measurements to words: which targets are met, and the tables that ``bench/gpu.py`` prints last."""

import math
from collections.abc import Callable
from typing import Any

from records import OURS, PEERS, TWINS, Record, against, from_cases

Entry = dict[str, Any]  # a case, as the JSON has it

_LARGE, _WIDTH = 8192, 256  # sizes that targets of vector quantization are about: N at least, D
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


def evaluate_targets(entries: list[Entry], ours: str) -> list[dict[str, Any]]:
    """The targets that apply to the cases, for the schedule that users get.

    ``met`` is None where a case or a competitor has no time (not measured, not installed, out of memory): nothing was
    shown. Where ours has none, wrong or failed, the target is missed.
    """
    targets: list[dict[str, Any]] = []

    def add(
        entry: Entry, what: str, wanted: float, got: float | None, at_most: bool = False, runner: str = ours
    ) -> None:
        met = None
        if got is not None:
            met = got <= wanted if at_most else got >= wanted
        elif entry["results"].get(runner, {"status": "ok"})["status"] != "ok":
            met = False
        case = {"case": entry["case"], "what": what, "at_most": at_most}
        targets.append(case | {"target": wanted, "measured": got, "met": met})

    def add_contrastive(entry: Entry) -> None:
        part, length, width = entry["part"], entry["length"], entry["width"]
        if part == "forward+backward" and length >= 4096:
            add(entry, "times as fast as eager", 8.0, speed_up(entry, ours, "eager"))
            add(entry, "times as fast as inf-cl", 4.0, speed_up(entry, ours, "inf-cl"), runner=TWINS["inf-cl"])
        if part == "forward+backward" and (length, width) == (65536, 64):
            extra = measured(entry, ours, "mib")
            add(entry, "GB besides inputs and outputs", 1.0, extra and extra * 2**20 / 1e9, at_most=True)
        if width >= 256:
            add(entry, f"of the matmul rate, {entry['products']} product(s)", 0.4, measured(entry, ours, "share"))

    for entry in entries:
        if entry["dtype"] == "float32":
            continue
        if entry["op"] == "weighted_info_nce":
            add_contrastive(entry)
            continue
        part, codes = entry["part"], entry["codes"]
        if entry["width"] != _WIDTH:
            continue
        if part == "forward+backward" and codes == 1024 and entry["graph"]:
            add(entry, "ms under a CUDA graph", 0.1, measured(entry, ours, "ms"), at_most=True)
        if part == "forward+backward" and not entry["masked"] and codes == 262144:
            extra = measured(entry, ours, "mib")
            add(entry, "GB besides inputs and outputs", 2.0, extra and extra * 2**20 / 1e9, at_most=True)
        if codes < _LARGE or entry["graph"]:
            continue
        if part == "forward+backward":
            add(entry, "times as fast as eager", 8.0, speed_up(entry, ours, "eager"))
            add(entry, "times as fast as torch.compile", 3.0, speed_up(entry, ours, "compiled"))
            add(entry, "of the matmul rate, 6 products", 0.45, measured(entry, ours, "share"))
        elif part == "forward":
            add(entry, "of the matmul rate", 0.45, measured(entry, ours, "share"))
        else:
            add(entry, "of the matmul rate", 0.65, measured(entry, ours, "share"))
            add(entry, "times as fast as flash-kmeans", 1.0, speed_up(entry, ours, "flash-kmeans"))
    return targets


def step_targets(benchmarks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of the paper's training step with ``--amp --compile``, beside taming-transformers' own; open where unmeasured."""
    steps = {b["extra_info"]["competitor"]: b for b in benchmarks if b["extra_info"]["op"] == "vqgan"}

    def get(name: str, what: Callable[[dict[str, Any]], float]) -> float | None:
        return what(steps[name]) if name in steps else None

    def target(what: str, wanted: float, at_most: bool, a: float | None, b: float | None) -> dict[str, Any]:
        got = a / b if a and b else None
        met = None if got is None else (got <= wanted if at_most else got >= wanted)
        case = {"case": "training step, amp and compile", "what": what, "at_most": at_most}
        return case | {"target": wanted, "measured": got, "met": met}

    names = ("amp-compile", "taming-amp", "taming")
    ours, theirs_amp, theirs = (get(name, lambda entry: entry["stats"]["median"]) for name in names)
    our_mib, _, their_mib = (get(name, lambda entry: entry["extra_info"]["peak_mib"]) for name in names)
    return [
        target("times as fast as taming's in mixed precision", 3.0, False, theirs_amp, ours),
        target("times as fast as taming's", 5.0, False, theirs, ours),
        target("of taming's memory", 0.6, True, our_mib, their_mib),
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


def ratios(entries: list[Entry], ours: str) -> str:
    peers = [name for name in PEERS if any(name in entry["results"] for entry in entries)]
    head = ["times as fast as", *peers, "% of matmul", "TFLOP/s", "MiB", "eager MiB"]

    def row(entry: Entry) -> list[str]:
        rate = measured(entry, ours, "share")
        return [
            entry["case"],
            *(_cell(entry, name, speed_up(entry, ours, name), ".1f") for name in peers),
            _cell(entry, ours, None if rate is None else 100 * rate, ".0f"),
            _cell(entry, ours, measured(entry, ours, "tflops"), ".0f"),
            *(_cell(entry, name, measured(entry, name, "mib"), ".0f") for name in (ours, "eager")),
        ]

    return format_table([head, *map(row, entries)])


def times(entries: list[Entry], ours: str, gpu: str) -> str:
    present = [*OURS, *PEERS, "matmul"]
    names = [name for name in present if any(name in entry["results"] for entry in entries)]
    head = [f"ms on {gpu}", *names, "host"]

    def row(entry: Entry) -> list[str]:
        cells = [_cell(entry, name, measured(entry, name, "ms"), ".3f") for name in names]
        return [entry["case"], *cells, _cell(entry, ours, entry["results"].get(ours, {}).get("host_ms"), ".3f")]

    return format_table([head, *map(row, entries)])


def target_table(targets: list[dict[str, Any]]) -> str:
    words = {True: "met", False: "NOT MET", None: "open"}
    rows = [["target", "", "wanted", "measured", ""]]
    for target in targets:
        measured = "-" if target["measured"] is None else f"{target['measured']:.3g}"
        wanted = f"{'<=' if target['at_most'] else '>='} {target['target']:g}"
        rows.append([target["case"], target["what"], wanted, measured, words[target["met"]]])
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
    """The end of the output: ratios first, then the times they are made of, the targets, and what went wrong."""
    machine, method, entries = report["machine"], report["method"], report["cases"]
    ours, tests = method["default_schedule"], report["tests"]
    failed = tests is not None and tests["status"] == "failed"
    lines = ["TESTS OF THE OPS FAILED: no speed-up below is to be reported", ""] if failed else []
    lines += [
        f"{machine['gpu']}, driver {machine['driver']}, torch {machine['torch']}, triton {machine['triton']}",
        f"M = {method['rows']}, D = {method['width']}, {100 * method['mask_ratio']:.0f} % of the rows stochastic; ours "
        f"is the {ours} schedule; medians of up to {method['repeats']}, cold L2, launches hidden",
        "MiB: besides inputs and outputs; host: ms until a call of ours returns, the launches",
        "% of matmul: of the rate of the plain product of the same size; 8192 x 8192 x 8192 reaches "
        + ", ".join(f"{rate:.0f} TFLOP/s in {dtype}" for dtype, rate in report["matmul_8192_tflops"].items()),
        "vqp: vector-quantize-pytorch, other functions: nearest code without noise, Gumbel noise on every row; in fp32",
        "nearest: our NearestQuantizer, compared with vqp's and taming's",
        "InfoNCE: gradient to the key only; vanilla: ours without weights, compared with inf-cl, which has none",
        "",
    ]
    for op in dict.fromkeys(entry["op"] for entry in entries):
        cases = [entry for entry in entries if entry["op"] == op]
        lines += [ratios(cases, ours), "", times(cases, ours, machine["gpu"]), ""]
    if report.get("benchmarks"):
        lines += [step_table(report["benchmarks"]), ""]
    if report["targets"]:
        lines += [target_table(report["targets"]), ""]
    late = [case for case, reason in report["not_measured"].items() if reason == OUT_OF_TIME]
    if late:
        lines.append(f"{OUT_OF_TIME}, not measured: {'; '.join(late)}")
    lines.append("tests/ops: not run" if tests is None else f"tests/ops {tests['status']}: {tests['counts']}")
    return "\n".join(lines + [f"PROBLEM: {problem}" for problem in problems(report)])
