"""Write the measured tables and plots of README.md and docs from bench/results and results: none is typed by hand.

    python bench/report.py             fills what stands between <!-- bench:NAME --> and <!-- /bench -->, draws plots
    python bench/report.py --check     writes nothing; exits with 1 and names what differs from the results

New results: ``pytest bench/ --benchmark-only --records bench/results/cpu.json`` on a CPU, or ``python bench/gpu.py`` on
a GPU, committed with the pages that this writes from them. A record is one competitor in one case.
"""

import argparse
import json
import math
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PICTURES, PAPER = "bench/results", "docs/pictures", "results/scenes-tiny"
SECTION = re.compile(r"<!-- bench:(?P<name>[\w-]+) -->\n(?P<body>.*?)<!-- /bench -->", re.DOTALL)
NOTHING_YET = "Nothing has been measured yet: `{}` does it."
NO_STUDY = (
    "Not run yet: the command is above; its tables and plots go to results, and `python bench/report.py` fills this."
)
HOW = {"gpu": "python bench/gpu.py", "cpu": "pytest bench/ --benchmark-only --records bench/results/cpu.json"}

# Ours and what it is like for like with, by op.
OPS = ("vector_quantize", "assign_codes", "weighted_info_nce")
STEPS = {
    "vqgan": "VQ-GAN with discriminator",
    "autoregressive": "autoregressive prior",
    "diffusion": "diffusion prior",
    "masked": "masked prior",
}
BASELINES = dict.fromkeys(OPS, "eager") | {"vqgan": "taming", "autoregressive": "taming"}
BASELINES |= {"diffusion": "plain", "masked": "plain"}
PEERS = ("eager", "compiled", "vqp nearest", "taming nearest", "vqp gumbel", "flash-kmeans", "inf-cl")  # in this order
# Ours without weights and without noise, for those who compute that.
TWINS = {"inf-cl": "vanilla", "vqp nearest": "nearest", "taming nearest": "nearest"}
OURS = ("ours", "chunked", "vanilla", "nearest", "matmul")

Document = dict[str, Any]  # a file of results
Record = dict[str, Any]
Group = dict[str, Record]  # records of a case by competitor


# ------------------------------------------------------------------------------------------------------------ numbers


def table(head: list[str], rows: Iterable[list[str]], on_gpu: bool = True) -> str:
    """Return a Markdown table; absolute times only of a GPU, whose name says how fast it is."""
    kept = [k for k, name in enumerate(head) if on_gpu or name not in ("ours, ms", "ms")]
    lines = [[line[k] for k in kept] for line in (head, ["---"] * len(head), *rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value: float | None, digits: int = 3) -> str:
    """Return so many significant digits and every digit before the point; a dash for nothing."""
    if value is None or math.isnan(value):
        return "-"
    if value == 0:
        return "0"
    return f"{value:.{max(digits - 1 - math.floor(math.log10(abs(value))), 0)}f}"


def percent(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{100 * value:.{digits}f} %"


def times(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.{1 if value < 100 else 0}f} x"


def ratio(mine: Record | None, other: Record | None) -> float:
    """Return how many times as fast as ``other`` mine is; nan unless both have a time."""
    if not mine or not other or not mine.get("ms") or not other.get("ms"):
        return math.nan
    return float(other["ms"] / mine["ms"])


def own(op: str) -> str:
    return "ours" if op in OPS else "fp32"


def twin(group: Group, op: str, peer: str) -> Record | None:
    """Return the record of ours that computes what a peer does."""
    return group.get(TWINS.get(peer, ""), group.get(own(op)))


def against(group: Group, op: str, peer: str) -> float:
    return ratio(twin(group, op, peer), group.get(peer))


def rate(group: Group) -> float | None:
    """Return the fraction of the rate of the same product by a matmul that ours reaches."""
    mine, matmul = group.get("ours", {}), group.get("matmul", {})
    return mine["products"] * matmul["ms"] / mine["ms"] if mine.get("ms") and matmul.get("ms") else None


def groups_of(document: Document, op: str) -> list[Group]:
    """Return the cases of an op in the order of the file."""
    found: dict[str, Group] = {}
    for record in document["records"]:
        if record["op"] == op:
            found.setdefault(case_of(record), {})[record["competitor"]] = record
    return list(found.values())


def size_of(record: Record) -> str:
    return ", ".join([*(f"{name} = {value}" for name, value in record["size"].items()), record["detail"]])


def case_of(record: Record) -> str:
    return f"{record['part']}, {size_of(record)}"


def columns(groups: Iterable[Group]) -> list[str]:
    """Return the peers that take part in any of the cases."""
    names = dict.fromkeys(name for group in groups for name in group if name not in OURS)
    return sorted(names, key=lambda name: PEERS.index(name) if name in PEERS else len(PEERS))


def named(op: str) -> str:
    return f"`{op}`" if op in OPS else STEPS[op]


def measured_on(document: Document, *more: str) -> str:
    """Return hardware, date, commit and what else there is to know."""
    where = document["machine"]
    if gpu := where.get("gpu"):
        driver = f", driver {where['driver']}" if where.get("driver") else ""
        hardware = f"{gpu}{driver}, torch {where.get('torch')}, triton {where.get('triton')}"
    else:
        hardware = f"{where.get('cpu', 'unknown CPU')}, {where.get('cores', '?')} cores, torch {where.get('torch')}"
    commit = f"commit {where['commit'][:7]}" if where.get("commit") else ""
    commit += " with uncommitted changes" if commit and where.get("uncommitted_changes") else ""
    return "; ".join(part for part in (hardware, document["date"], commit, *more) if part)


# ------------------------------------------------------------------------------------------------- tables of records


def op_table(document: Document, op: str) -> str:
    """Return every case of an op: times of ours, how many times as fast it is as each peer, memory, rates."""
    groups = groups_of(document, op)
    peers = columns(groups)
    kinds = [name for name in ("eager", "compiled") if name in peers] + ["ours"]
    rates = any(rate(group) is not None for group in groups)
    head = [f"`{op}`", "ours, ms", *(f"against {name}" for name in peers), *(f"MiB, {name}" for name in kinds)]

    def row(group: Group) -> list[str]:
        ours = group.get("ours", {})
        cells = [case_of(next(iter(group.values()))), number(ours.get("ms"))]
        for name in peers:
            status = group.get(name, {}).get("status", "ok")
            status = "WRONG" if status == "wrong" else status
            cells.append(times(against(group, op, name)) if status == "ok" else status)
        cells += [number(group.get(name, {}).get("mib")) for name in kinds]
        tflops = ours["flops"] / ours["ms"] / 1e9 if ours.get("ms") else None
        return cells + ([number(tflops), percent(rate(group), 0)] if rates else [])

    return table(head + (["TFLOP/s", "of the matmul rate"] if rates else []), map(row, groups), on_gpu(document))


def step_tables(document: Document, op: str) -> str:
    """Return the modes of each part: time, how many times as fast as the baseline, memory."""
    found = []
    for group in groups_of(document, op):
        head = [case_of(next(iter(group.values()))), "ms", f"against {BASELINES[op]}", "MiB"]
        rows = [
            [
                name,
                number(record.get("ms")) if record["status"] == "ok" else record["status"],
                times(ratio(record, group.get(BASELINES[op]))),
                number(record.get("mib")),
            ]
            for name, record in group.items()
        ]
        found.append(table(head, rows, on_gpu(document)))
    title = STEPS[op][:1].upper() + STEPS[op][1:]
    return f"**{title}**\n\n" + "\n\n".join(found)


def on_gpu(document: Document) -> bool:
    return bool(document["machine"].get("gpu"))


def rivals(op: str, group: Group) -> list[str]:
    """Return baselines that ours must not lose to; of a step one alone: other modes are ours, or other precisions."""
    return [name for name in columns([group]) if op in OPS or name == BASELINES[op]]


def summary(document: Document) -> str:
    """Return one row a part of each op, at its largest size, and one of each step."""
    rows = []
    for op, baseline in BASELINES.items():
        largest: dict[str, Group] = {}
        for group in groups_of(document, op):
            ours = group.get(own(op), {})
            if not ours.get("ms") or ours["part"] == "backward":  # forward and both say it
                continue
            best = largest.get(ours["part"])
            if best is None or ours.get("flops", 0) > best[own(op)].get("flops", 0):
                largest[ours["part"]] = group
        for group in largest.values():
            ours, other = group[own(op)], group.get(baseline, {})
            same_job = [name for name in rivals(op, group) if group[name].get("ms") and name not in TWINS]
            closest = min(same_job, key=lambda name: against(group, op, name), default=baseline)
            speed = f"{times(ratio(ours, other))} ({baseline})", f"{times(against(group, op, closest))} ({closest})"
            label = f"{named(op)}, {case_of(ours)}"
            rows.append([label, number(ours["ms"]), *speed, number(other.get("mib")), number(ours.get("mib"))])
    head = ["", "ours, ms", "as fast as the baseline", "as the closest peer measured", "MiB, baseline", "MiB, ours"]
    return table(head, rows, on_gpu(document))


def where_worse(document: Document) -> str:
    """Return the cases in which a peer is faster than ours, or takes less memory."""
    found = []
    for op in BASELINES:
        for group in groups_of(document, op):
            for name in rivals(op, group):
                mine, peer, better = twin(group, op, name), group[name], []
                if (speed := against(group, op, name)) < 1:
                    better.append(f"is {1 / speed:.2f} x as fast")
                if mine and mine.get("mib") and peer.get("mib") is not None and peer["mib"] < mine["mib"]:
                    better.append(f"takes {number(peer['mib'] / mine['mib'], 2)} of the memory")
                nearest = op == "vector_quantize" and TWINS.get(name) == "nearest"
                what = "`NearestQuantizer`" if nearest else named(op)
                found += [f"- {what}, {case_of(peer)}: {name} {', '.join(better)}"] if better else []
    where = " nowhere." if not found else "\n\n" + "\n".join(found)
    return f"Where ours is slower, or takes more memory, than a peer:{where}"


def not_measured(document: Document) -> str:
    """Return what a run of ``bench/gpu.py`` has no numbers of, and why."""
    by_reason: dict[str, list[str]] = {}
    for case, reason in document.get("not_measured", {}).items():
        by_reason.setdefault(reason, []).append(case)
    found = [f"- {reason}: {'; '.join(cases)}" for reason, cases in by_reason.items()]
    for script, part in document.get("parts", {}).items():
        if not part["measured"] and part["status"] != "done":
            told = f", {part['told'][0]}" if part["told"] else ""
            found.append(f"- `{script}` {part['status']} after {part['seconds']:.0f} s{told}")
    return "Not measured:\n\n" + "\n".join(found) if found else ""


def full(document: Document) -> str:
    """Return everything that a file holds."""
    parts = [op_table(document, op) for op in OPS if groups_of(document, op)]
    parts += [step_tables(document, op) for op in STEPS if groups_of(document, op)]
    return "\n\n".join(part for part in (*parts, where_worse(document), not_measured(document)) if part)


def targets(document: Document) -> str:
    """Return the targets of ``bench/gpu.py`` that were measured, met or missed."""
    rows = []
    for found in document.get("targets", []):
        if found["met"] is not None:
            wanted = f"{'at most' if found['at_most'] else 'at least'} {found['target']:g}"
            verdict = "met" if found["met"] else "**missed**"
            rows.append([found["case"], found["what"], wanted, number(found["measured"]), verdict])
    return table(["case", "target", "wanted", "measured", ""], rows) if rows else ""


# -------------------------------------------------------------------------------------------------------------- plots


def series(document: Document, kind: str) -> dict[str, list[tuple[int, float]]]:
    """Return points by N of each competitor, of the cases of ``vector_quantize`` that differ in N alone."""
    families: dict[str, list[Group]] = {}
    for group in groups_of(document, "vector_quantize"):
        record = next(iter(group.values()))
        if record["part"] == "forward+backward":
            same = {name: value for name, value in record["size"].items() if name != "N"}
            families.setdefault(f"{same} {record['detail']}", []).append(group)
    found: dict[str, list[tuple[int, float]]] = {}
    best = max(families.values(), key=len, default=[])
    for group in sorted(best, key=lambda group: next(iter(group.values()))["size"]["N"]):
        for name in [*(["ours"] if kind == "memory" else []), *columns([group])]:
            record = group.get(name, {})
            value = record.get("mib") if kind == "memory" else against(group, "vector_quantize", name)
            if value and not math.isnan(value):
                found.setdefault(name, []).append((record["size"]["N"], value))
    return found


PLOTS = {
    "speed-up": "vector_quantize, forward + backward: how many times as fast as",
    "memory": "vector_quantize, forward + backward: MiB that a call adds",
}


def draw(path: Path, title: str, lines: dict[str, list[tuple[int, float]]], where: str) -> None:
    """Draw a plot of points by N."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 4), dpi=110)
    for name, points in lines.items():
        axes.plot(*zip(*points, strict=True), "o-", markersize=4, label=name)
    axes.set(xscale="log", yscale="log", xlabel="N, codes", title=title)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.text(1, -0.2, where, transform=axes.transAxes, ha="right", fontsize=7, color="#777777")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})
    pyplot.close(figure)


# -------------------------------------------------------------------------------------------------------------- pages


def load(root: Path, name: str) -> Document:
    found: Document = json.loads((root / RESULTS / name).read_text(encoding="utf-8"))
    return found


def suites(root: Path, kind: str) -> list[str]:
    """Return the files of the whole suite: of a CPU, or of GPUs."""
    return sorted(path.name for path in (root / RESULTS).glob("cpu.json" if kind == "cpu" else "gpu*.json"))


def plots(root: Path, name: str) -> dict[str, tuple[str, Any]]:
    """Return title and points, by path from the root, of the plots that a file has the data for."""
    found = {kind: series(load(root, name), kind) for kind in PLOTS}
    stem = f"{PICTURES}/bench-{name.removesuffix('.json')}"
    enough = {kind: max(map(len, lines.values()), default=0) > 1 for kind, lines in found.items()}
    return {f"{stem}-{kind}.png": (PLOTS[kind], lines) for kind, lines in found.items() if enough[kind]}


def section(root: Path, name: str, up: str) -> str:
    """Return the Markdown of a section; ``up`` leads from the page to the root."""
    for file in sorted(path.name for path in (root / RESULTS).glob("*.json")):
        document = load(root, file)
        if found := document.get("tables", {}).get(name):  # of results of another kind
            where = f"{measured_on(document, found['more'])}.\n\n([JSON]({up}{RESULTS}/{file}))"
            return f"{table(found['head'], found['rows'])}\n\n{where}"
    kind, _, what = name.partition("-")
    if kind == "paper":  # a table of train/paper.py, without its title
        text = (root / f"{PAPER}/{what}.md").read_text(encoding="utf-8").partition("\n\n")[2].strip()
        return f"{text} ([the numbers of each run]({up}{PAPER}/{what}.csv))"
    if kind == "study":  # of regvq paper quantizers on one data set
        stem = f"results/{what}-tiny/quantizers"
        if not (root / f"{stem}.md").exists():
            return NO_STUDY
        text = (root / f"{stem}.md").read_text(encoding="utf-8").partition("\n\n")[2].strip()
        return f"{text} ([the numbers of each run]({up}{stem}.csv))\n\n![curves]({up}{stem}-curves.png)"
    makers = {"summary": summary, "tables": full, "targets": targets, "plots": None}
    if kind not in HOW or what not in makers:
        raise ValueError(f"<!-- bench:{name} -->: no such section; see bench/report.py")
    parts = []
    for file in suites(root, kind):
        document, make = load(root, file), makers[what]
        if make is None:
            parts += [f"![{title}]({up}{path})" for path, (title, _) in plots(root, file).items()]
            continue
        source = f"{measured_on(document, document.get('note', ''))} ([JSON]({up}{RESULTS}/{file}))."
        parts += [source, make(document)] if what != "targets" else [make(document)]
    return "\n\n".join(part for part in parts if part) or NOTHING_YET.format(HOW[kind])


def render(root: Path, page: Path) -> str:
    """Return the page as it should be. Raises ValueError where a marker stands alone or isn't known."""
    text, up = page.read_text(encoding="utf-8"), "../" * (len(page.relative_to(root).parts) - 1)
    opened, found = re.findall(r"<!-- bench:(.*?) -->", text), [match["name"] for match in SECTION.finditer(text)]
    if opened != found or text.count("<!-- /bench -->") != len(found):
        raise ValueError(f"{page}: each <!-- bench:NAME --> needs its <!-- /bench -->, on lines of their own")
    filled = "<!-- bench:{} -->\n{}\n<!-- /bench -->".format
    return SECTION.sub(lambda match: filled(match["name"], section(root, match["name"], up)), text)


def stale(root: Path = ROOT) -> dict[Path, str]:
    """Return the pages below a folder that differ from the results there, and what they should be."""
    rendered = {page: render(root, page) for page in (root / "README.md", *sorted((root / "docs").glob("*.md")))}
    return {page: text for page, text in rendered.items() if text != page.read_text(encoding="utf-8")}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail where a page differs from the results"
    )
    parser.add_argument("--root", type=Path, default=ROOT, help="of the checkout")
    options = parser.parse_args(arguments)
    root = options.root.resolve()
    changed = stale(root)
    for page, text in changed.items():
        print(f"{page} {'differs from bench/results: python bench/report.py' if options.check else 'written'}")
        if not options.check:
            page.write_text(text, encoding="utf-8")
    if options.check:
        return 1 if changed else 0
    for name in suites(root, "cpu") + suites(root, "gpu"):
        for path, (title, lines) in plots(root, name).items():
            draw(root / path, title, lines, measured_on(load(root, name)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
