"""The plots of ``bench/report.py``: speed-up and memory against N, roofline, share of a step's time.

A plot carries the digest of the records it was drawn from: matplotlib's bytes differ from version to version, the
digest tells whether a plot is of these results.
"""

import hashlib
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import report_tables
from PIL import Image
from records import Document, Record, by_case

FOLDER = "docs/pictures"
PREFIX = "bench-"
DIGEST = "Source"  # a text field of the PNG
COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2", "#97bbf5")

Series = dict[str, list[tuple[float, float]]]  # by label: points


def _sweep(document: Document, part: str) -> list[dict[str, Record]]:
    """The largest set of ``vector_quantize``'s cases that differ in N alone, in the order of N."""
    families: dict[Any, list[dict[str, Record]]] = {}
    for case in by_case(document.of("vector_quantize")).values():
        record = next(iter(case.values()))
        if record.part == part:
            families.setdefault((record.get("rows"), record.get("width"), record.detail), []).append(case)
    best = max(families.values(), key=len, default=[])
    return sorted(best, key=lambda case: next(iter(case.values())).get("codes"))


def speed_up(document: Document) -> Series:
    """How many times as fast as each peer, by N."""
    series: Series = {}
    mine = report_tables.own(document, "vector_quantize")
    for case in _sweep(document, "forward+backward"):
        for name in report_tables.columns([case]):
            value = report_tables.against(case, mine, name)
            if value == value:  # not nan: both were measured
                series.setdefault(name, []).append((case[name].get("codes"), value))
    return series


def memory(document: Document) -> Series:
    """MiB that a call of each adds, by N; on a GPU without its outputs."""
    series: Series = {}
    mine = report_tables.own(document, "vector_quantize")
    for case in _sweep(document, "forward+backward"):
        for name in [mine, *report_tables.columns([case])]:
            if name in case and case[name].mib:
                label = "ours" if name == mine else name
                series.setdefault(label, []).append((case[name].get("codes"), case[name].mib or 0.0))
    return series


def roofline(document: Document) -> Series:
    """TFLOP/s of ours by operations a byte of inputs and outputs, a label for each part of an op."""
    series: Series = {}
    for record in document.of(*report_tables.OPS):
        if record.competitor == report_tables.own(document, record.op) and record.flops and record.bytes and record.ms:
            point = (record.flops / record.bytes, record.flops / record.ms / 1e9)
            series.setdefault(f"{record.op}, {record.part}", []).append(point)
    return {name: sorted(points) for name, points in series.items()}


def breakdown(document: Document) -> Series:
    """Milliseconds of the parts of the last training step that tells them."""
    told = [entry["extra_info"].get("parts_ms") for entry in document.raw.get("benchmarks", [])]
    parts: dict[str, float] = next((parts for parts in reversed(told) if parts), {})
    return {name: [(0.0, ms)] for name, ms in parts.items()}


KINDS: dict[str, tuple[str, Callable[[Document], Series]]] = {
    "speed-up": ("vector_quantize, forward + backward: how many times as fast as", speed_up),
    "memory": ("vector_quantize, forward + backward: MiB that a call adds", memory),
    "roofline": ("TFLOP/s by operations a byte, with the measured rates as the roof", roofline),
    "step": ("where the time of a training step goes", breakdown),
}


def plots_of(document: Document) -> dict[str, str]:
    """Paths, from the root, and titles of the plots that a file of results has the data for."""
    least = {"speed-up": 2, "memory": 2, "roofline": 1, "step": 1}  # points that make a plot
    return {
        f"{FOLDER}/{PREFIX}{document.path.stem}-{kind}.png": title
        for kind, (title, series) in KINDS.items()
        if max(map(len, series(document).values()), default=0) >= least[kind]
    }


def _kind(path: Path, document: Document) -> str:
    return path.stem.removeprefix(f"{PREFIX}{document.path.stem}-")


def _digest(path: Path, document: Document) -> str:
    title, series = KINDS[_kind(path, document)]
    return hashlib.sha256(repr((title, series(document), _roof(document))).encode()).hexdigest()


def is_current(path: Path, document: Document) -> bool:
    """Whether a plot is there and of these results."""
    if not path.exists():
        return False
    with Image.open(path) as image:
        return bool(image.info.get(DIGEST) == _digest(path, document))


def _roof(document: Document) -> dict[str, tuple[float, float]]:
    """Measured TFLOP/s of a product and TB/s of a copy, by type."""
    rates = document.raw.get("matmul_8192_tflops") or document.raw.get("matmul_tflops") or {}
    copy = document.raw.get("copy_tb_per_s")
    return {dtype: (rate, copy) for dtype, rate in rates.items()} if copy else {}


def draw(path: Path, document: Document) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator

    kind = _kind(path, document)
    title, make = KINDS[kind]
    series = make(document)
    figure, axes = pyplot.subplots(figsize=(7 if kind == "step" else 9, 4), dpi=110)
    if kind == "step":
        _bars(axes, series, document.on_gpu)
    else:
        for (name, points), colour in zip(series.items(), itertools.cycle(COLOURS), strict=False):
            style = "o" if kind == "roofline" else "o-"
            axes.plot(*zip(*points, strict=True), style, markersize=4, color=colour, label=name)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.set_xlabel("operations a byte" if kind == "roofline" else "N, codes")
        if kind == "roofline":
            _draw_roof(axes, document)
        elif kind == "speed-up":
            axes.axhline(1, color="#999999", linewidth=1)
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.set_title(title, fontsize=10)
    axes.text(1, -0.2, document.hardware, transform=axes.transAxes, ha="right", fontsize=7, color="#777777")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={DIGEST: _digest(path, document)})
    pyplot.close(figure)


def _bars(axes: Any, series: Series, on_gpu: bool) -> None:
    """Shares of the step; milliseconds beside them of a GPU alone, as in the tables."""
    times = {name: points[0][1] for name, points in reversed(series.items())}
    shares = [time / sum(times.values()) for time in times.values()]
    axes.barh(list(times), [100 * share for share in shares], color=COLOURS[0])
    axes.set_xlabel("% of the step")
    for place, (share, time) in enumerate(zip(shares, times.values(), strict=True)):
        absolute = f", {report_tables.number(time)} ms" if on_gpu else ""
        axes.text(100 * share, place, f" {report_tables.percent(share)}{absolute}", va="center", fontsize=8)
    axes.margins(x=0.2)


def _draw_roof(axes: Any, document: Document) -> None:
    roof = _roof(document)
    low, high = axes.get_xlim()
    low = min(low, *(rate / copy / 2 for rate, copy in roof.values()))  # where memory is the limit, too
    for dtype, (rate, copy) in roof.items():
        ridge = rate / copy
        points = [(low, low * copy), (ridge, rate), (max(high, ridge), rate)]
        axes.plot(*zip(*points, strict=True), color="#999999", linewidth=1)
        axes.annotate(dtype, points[-1], fontsize=7, color="#777777", ha="right", va="bottom")
