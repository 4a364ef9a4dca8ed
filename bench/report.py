"""Write the measured tables of README.md and docs from bench/results and results: none is typed by hand.

    python bench/report.py             fills what stands between <!-- bench:NAME --> and <!-- /bench -->
    python bench/report.py --check     writes nothing; exits with 1 and names what differs from the results

New results: ``pytest bench/ --benchmark-only --records bench/results/cpu.json``, on a GPU ``gpu-NAME.json``, committed
with the pages that this writes from them. A record is one competitor in one case.
"""

import argparse
import itertools
import json
import math
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAPER = "bench/results", "results/scenes-tiny"
SECTION = re.compile(r"<!-- bench:(?P<name>[\w-]+) -->\n(?P<body>.*?)<!-- /bench -->", re.DOTALL)
NOTHING_YET = "Nothing has been measured yet: `pytest bench/ --benchmark-only --records bench/results/{}.json` does it."
NO_STUDY = (
    "Not run yet: the command is above; its tables and plots go to results, and `python bench/report.py` fills this."
)

WHOLE = ("forward+backward", "assign", "training step")
OPS = ("vector_quantize", "assign_codes", "weighted_info_nce")
STEPS = {
    "vqgan": "VQ-GAN with discriminator",
    "autoregressive": "autoregressive prior",
    "diffusion": "diffusion prior",
    "masked": "masked prior",
}
TITLES = {op: f"`{op}`" for op in OPS} | STEPS
# Competitors of others in the order of columns; the first one in a case is its baseline.
PEERS: tuple[str, ...] = ("eager", "compiled", "vqp nearest", "taming nearest", "vqp gumbel", "flash-kmeans", "inf-cl")
PEERS += ("taming", "diffusers", "library")
# Ours without weights and without noise, for those who compute that.
TWINS = {"inf-cl": "vanilla", "vqp nearest": "nearest", "taming nearest": "nearest"}

Document = dict[str, Any]  # a file of results
Record = dict[str, Any]
NOTHING: Record = {"status": "ok", "ms": math.nan, "mib": math.nan, "size": {}}


class Group(dict[str, Record]):
    """Records of a case by competitor; of one that is not there, no numbers."""

    def __missing__(self, name: str) -> Record:
        return NOTHING


# ------------------------------------------------------------------------------------------------------------ numbers


def table(head: list[str], rows: Iterable[list[str]], document: Document | None = None) -> str:
    """Return a Markdown table; absolute times only of a GPU, whose name says how fast it is."""
    on_cpu = document is not None and not document["machine"].get("gpu")
    kept = [k for k, name in enumerate(head) if not on_cpu or name not in ("ours, ms", "ms")]
    lines = [[line[k] for k in kept] for line in (head, ["---"] * len(head), *rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value: float, digits: int = 3) -> str:
    """Return so many significant digits and every digit before the point; a dash for nothing."""
    if math.isnan(value):
        return "-"
    return f"{value:.{max(digits - 1 - math.floor(math.log10(abs(value))), 0)}f}" if value else "0"


def times(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.{1 if value < 100 else 0}f} x"


def ratio(mine: Record, other: Record, key: str = "ms") -> float:
    """Return how many times as fast as ``other`` mine is; nan unless both have a time."""
    return float(other[key] / mine[key]) if mine[key] else math.nan


def own(group: Group) -> Record:
    return group["ours" if "ours" in group else "fp32"]


def twin(group: Group, peer: str) -> Record:
    """Return the record of ours that computes what a peer does."""
    return group.get(TWINS.get(peer, ""), own(group))


def against(group: Group, peer: str) -> float:
    return ratio(twin(group, peer), group[peer])


def rate(group: Group) -> float:
    """Return the fraction of the rate of the same product by a matmul that ours reaches; nan for no time."""
    return ratio(group["ours"], group["matmul"]) * case_of(group).get("products", math.nan)


def flops(record: Record) -> float:
    return math.prod(record["size"].values()) * record["size"].get("L", 1) * 2 * record.get("products", 0)


def groups_of(document: Document, op: str) -> list[Group]:
    """Return the cases of an op in the order of the file."""
    found: dict[str, Group] = {}
    for record in document["records"]:
        if record["op"] == op:
            known = {name: value for name, value in record.items() if value is not None}
            found.setdefault(name_of(record), Group())[record["competitor"]] = NOTHING | known
    return list(found.values())


def case_of(group: Group) -> Record:
    """Return any of its records, for what they share."""
    return next(iter(group.values()))


def name_of(case: Record) -> str:
    size = (f"{name} = {value}" for name, value in case["size"].items())
    return ", ".join([case["part"], *size, case["detail"]])


def peers_in(*groups: Group) -> list[str]:
    return [name for name in PEERS if any(name in group for group in groups)]


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
    peers = peers_in(*groups)
    kinds = [name for name in ("eager", "compiled") if name in peers] + ["ours"]
    head = [TITLES[op], "ours, ms", *(f"against {name}" for name in peers), *(f"MiB, {name}" for name in kinds)]
    head += ["TFLOP/s", "of the matmul rate"]
    rows = []
    for group in groups:
        ours, share = group["ours"], rate(group)
        states = {name: group[name]["status"] for name in peers}
        speeds = [times(against(group, name)) if state == "ok" else state for name, state in states.items()]
        memory = [number(group[name]["mib"]) for name in kinds]
        rates = [number(flops(ours) / ours["ms"] / 1e9), "-" if math.isnan(share) else f"{100 * share:.0f} %"]
        rows.append([name_of(case_of(group)), number(ours["ms"]), *speeds, *memory, *rates])
    return table(head, rows, document)


def step_tables(document: Document, op: str) -> str:
    """Return the modes of each part: time, how many times as fast as the baseline, memory."""
    found = [f"**{TITLES[op][:1].upper() + TITLES[op][1:]}**"]
    for group in groups_of(document, op):
        rows, other = [], next(iter(peers_in(group)), "fp32")
        for name, record in group.items():
            ms = number(record["ms"]) if record["status"] == "ok" else record["status"]
            rows.append([name, ms, times(ratio(record, group[other])), number(record["mib"])])
        found.append(table([name_of(case_of(group)), "ms", f"against {other}", "MiB"], rows, document))
    return "\n\n".join(found)


def summary(document: Document) -> str:
    """Return one row per op, with its gradients and at its largest size, and one per training step that has a peer."""
    largest: dict[tuple[str, str], Group] = {}
    for op in TITLES:
        for group in groups_of(document, op):
            case = op, case_of(group)["part"]
            part, _, variant = case[1].partition(", ")
            if part in WHOLE and not variant.startswith("hard") and own(group)["ms"] > 0 and peers_in(group):
                largest[case] = max(largest.get(case, group), group, key=lambda group: flops(own(group)))
    rows = []
    for (op, _), group in largest.items():
        ours, first = own(group), peers_in(group)[0]
        same_job = [name for name in peers_in(group) if group[name]["ms"] > 0 and name not in TWINS]
        closest = min(same_job, key=lambda name: against(group, name), default=first)
        speed = [f"{times(against(group, name))} ({name})" for name in (first, closest)]
        memory = [number(record["mib"]) for record in (group[first], ours)]
        rows.append([f"{TITLES[op]}, {name_of(ours)}", number(ours["ms"]), *speed, *memory])
    head = ["", "ours, ms", "as fast as the baseline", "as the closest peer measured", "MiB, baseline", "MiB, ours"]
    return table(head, rows, document)


def where_worse(document: Document) -> str:
    """Return the cases in which a peer is faster than ours, or takes less memory."""
    found = []
    for group in itertools.chain(*(groups_of(document, op) for op in TITLES)):
        for name in peers_in(group):
            better = []
            if (speed := against(group, name)) < 1:
                better.append(f"is {1 / speed:.2f} x as fast")
            if (memory := ratio(twin(group, name), group[name], "mib")) < 1:
                better.append(f"takes {number(memory, 2)} of the memory")
            case, nearest = case_of(group), TWINS.get(name) == "nearest" and "nearest" in group
            what = "`NearestQuantizer`" if nearest else TITLES[case["op"]]
            found += [f"- {what}, {name_of(case)}: {name} {', '.join(better)}"] if better else []
    where = " nowhere." if not found else "\n\n" + "\n".join(found)
    return f"Where ours is slower, or takes more memory, than a peer:{where}"


def full(document: Document) -> str:
    """Return everything that a file holds, and what it lacks."""
    made = ((op_table if op in OPS else step_tables)(document, op) for op in TITLES if groups_of(document, op))
    missing = [f"- {line}" for line in document.get("not_measured", [])]
    return "\n\n".join([*made, where_worse(document), *(["\n".join(["Not measured:\n", *missing])] if missing else [])])


# ------------------------------------------------------------------------------------------------------------- targets

RATE, MS, GB = "of the matmul rate", "ms on an H200", "GB besides inputs and outputs"  # the last two at most
# Of a GPU: op and part, for which N or L, D or C, and whether in 16 bits, against which peer or what else, wanted.
TARGETS: tuple[tuple[str, Callable[[int, int, bool], bool], str, float], ...] = (
    ("vector_quantize, forward+backward", lambda n, d, half: d <= 64, "eager", 8.0),
    ("vector_quantize, forward+backward", lambda n, d, half: d <= 64, "compiled", 3.0),
    ("vector_quantize, forward+backward", lambda n, d, half: half and d == 256 and n >= 1024, "compiled", 2.2),
    # 60 % over the 7 products that ours does (docs/kernels.md).
    ("vector_quantize, forward+backward", lambda n, d, half: half and d == 256 and n >= 1024, RATE, 0.6 * 6 / 7),
    ("vector_quantize, forward+backward, CUDA graph", lambda n, d, half: n == 1024, MS, 0.12),
    ("vector_quantize, forward+backward", lambda n, d, half: half and (n, d) == (8192, 256), MS, 0.68),
    ("vector_quantize, forward+backward", lambda n, d, half: half and (n, d) == (65536, 256), MS, 5.5),
    ("vector_quantize, forward+backward, no noise", lambda n, d, half: n == 262144, GB, 2.0),
    ("vector_quantize, forward", lambda n, d, half: half and d == 256 and n >= 8192, RATE, 0.45),
    ("assign_codes, assign", lambda n, d, half: half and d == 256 and n >= 8192, RATE, 0.65),
    ("assign_codes, assign", lambda n, d, half: half and d == 256 and n >= 8192, "flash-kmeans", 1.0),
    ("weighted_info_nce, forward+backward", lambda n, d, half: n >= 4096, "eager", 8.0),
    ("weighted_info_nce, forward+backward", lambda n, d, half: n >= 4096, "inf-cl", 4.0),
    ("weighted_info_nce, forward+backward", lambda n, d, half: d >= 256, RATE, 0.4),
    ("weighted_info_nce, forward+backward", lambda n, d, half: (n, d) == (65536, 64), GB, 1.0),
)


def targets(document: Document) -> str:
    """Return the targets that the records meet or miss; a wrong result of ours misses all of its case."""
    rows: list[list[str]] = list(document.get("targets", []))  # of results from before, whose targets were others
    groups = [] if rows else [group for op in OPS for group in groups_of(document, op)]
    for group, (part, concerns, what, wanted) in itertools.product(groups, TARGETS):
        ours, case = group["ours"], case_of(group)
        (_, n, d), half = case["size"].values(), case["detail"] != "float32"
        if f"{case['op']}, {case['part']}" != part or not concerns(n, d, half):
            continue
        others = {RATE: rate(group), MS: ours["ms"], GB: (ours["mib"] or math.nan) * 2**20 / 1e9}
        got = others[what] if what in others else against(group, what)
        failed, least = ours["status"] != "ok", what not in (MS, GB)
        if failed or not math.isnan(got):
            met = not failed and (got >= wanted if least else got <= wanted)
            label = what if what in others else f"times as fast as {what}"
            bound = f"at {'least' if least else 'most'} {wanted:.3g}"
            cells = ["-" if failed else number(got), "met" if met else "**missed**"]
            rows.append([f"{case['op']}, {name_of(case)}", label, bound, *cells])
    return table(["case", "target", "wanted", "measured", ""], rows) if rows else ""


# -------------------------------------------------------------------------------------------------------------- pages

MAKERS: dict[str, Callable[[Document], str]] = {"summary": summary, "tables": full, "targets": targets}


def best_of_study(root: Path, codes: str) -> str:
    """Return the six quantizers of the study on scenes with the lowest Fréchet distance at a codebook size."""
    stem = f"{PAPER}/quantizers"
    lines = [line for line in (root / f"{stem}.md").read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    kept = [0, *(head.index(name) for name in ("FD[R]", "PSNR[R]", "SSIM[R]", "codes used", "FD[G]"))]
    size = [row for row in rows if row[0].endswith(f", {codes} codes")]
    best = sorted(size, key=lambda row: float(row[1].split()[0]))[:6]
    return table([head[k] for k in kept], [[row[k] for k in kept] for row in best])


def section(root: Path, name: str, up: str) -> str:
    """Return the Markdown of a section; ``up`` leads from the page to the root."""
    files = {path.name: json.loads(path.read_bytes()) for path in sorted((root / RESULTS).glob("*.json"))}
    for file, document in files.items():
        if found := document.get("tables", {}).get(name):  # of results of another kind
            where = f"{measured_on(document, found['more'])}.\n\n([JSON]({up}{RESULTS}/{file}))"
            return f"{table(found['head'], found['rows'])}\n\n{where}"
    kind, _, what = name.partition("-")
    if kind in ("paper", "study"):  # tables that `regvq paper` wrote
        stem = f"{PAPER}/{what}" if kind == "paper" else f"results/{what}-tiny/quantizers"
        if kind == "study" and not (root / f"{stem}.md").exists():
            return NO_STUDY
        text = (root / f"{stem}.md").read_text(encoding="utf-8").partition("\n\n")[2].strip()  # without its title
        curves = f"\n\n![curves]({up}{stem}-curves.png)" if kind == "study" else ""
        return f"{text} ([the numbers of each run]({up}{stem}.csv)){curves}"
    if kind == "peers":
        return best_of_study(root, what)
    if kind not in ("cpu", "gpu") or what not in MAKERS:
        raise ValueError(f"<!-- bench:{name} -->: no such section; see bench/report.py")
    parts = []
    for file, document in files.items():
        if file == "cpu.json" if kind == "cpu" else file.startswith("gpu"):  # of the whole suite
            source = f"{measured_on(document, document.get('note', ''))} ([JSON]({up}{RESULTS}/{file}))."
            parts += [*([source] if what != "targets" else []), MAKERS[what](document)]
    return "\n\n".join(part for part in parts if part) or NOTHING_YET.format("cpu" if kind == "cpu" else "gpu-NAME")


def render(root: Path, page: Path) -> str:
    """Return the page as it should be. Raises ValueError where a marker stands alone or isn't known."""
    text, up = page.read_text(encoding="utf-8"), "../" * (len(page.relative_to(root).parts) - 1)
    opened, found = re.findall(r"<!-- bench:(.*?) -->", text), [match["name"] for match in SECTION.finditer(text)]
    if opened != found or text.count("<!-- /bench -->") != len(found):
        raise ValueError(f"{page}: each <!-- bench:NAME --> needs its <!-- /bench -->, on lines of their own")
    filled = "<!-- bench:{} -->\n{}\n<!-- /bench -->".format
    return SECTION.sub(lambda match: filled(match["name"], section(root, match["name"], up)), text)


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a page differs")
    check = parser.parse_args(arguments).check
    rendered = {page: render(root, page) for page in (root / "README.md", *sorted((root / "docs").glob("*.md")))}
    stale = [page for page, text in rendered.items() if text != page.read_text(encoding="utf-8")]
    for page in stale:
        print(f"{page} {'differs from bench/results: python bench/report.py' if check else 'written'}")
        if not check:
            page.write_text(rendered[page], encoding="utf-8")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
