"""What ``bench/results`` holds, in one form: a record is one competitor in one case.

``pytest bench/ --benchmark-json FILE`` leaves pytest-benchmark's own JSON, with sizes, memory and machine in the
``extra_info`` of each benchmark; ``bench/gpu.py`` leaves its cases and, in the same form, the steps and priors.
"""

import argparse
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import machine

RESULTS = machine.ROOT / "bench" / "results"
HOLDS = {"benchmarks", "cases"}  # a file of benchmarks has one of them

# Competitors in the order of the tables; others of a case come after them.
PEERS = ("eager", "compiled", "vqp nearest", "taming nearest", "vqp gumbel", "flash-kmeans", "inf-cl")
# Ours: by schedule (in older results) or as users get it, and what others compute, without weights, without noise.
OURS = ("fused", "chunked", "ours", "vanilla", "nearest")
TWINS = {"inf-cl": "vanilla", "vqp nearest": "nearest", "taming nearest": "nearest"}

# Sizes in the order of a case's name.
SIZES = {"rows": "M", "codes": "N", "width": "D", "images": "B", "length": "L", "channels": "C"}


@dataclass(frozen=True)
class Record:
    """One competitor in one case; without a time where it was skipped or failed, for the reason in ``status``."""

    op: str
    part: str
    sizes: tuple[tuple[str, int], ...]  # by the names of SIZES
    detail: str  # the type; of steps and priors, what else the size is known by
    competitor: str
    status: str = "ok"
    ms: float | None = None
    mib: float | None = None  # peak, besides inputs and, on a GPU, outputs
    tflops: float | None = None
    share: float | None = None  # of the rate of the same product by a matmul
    flops: float | None = None
    bytes: float | None = None  # read and written at least, for the roofline

    @property
    def case(self) -> tuple[Any, ...]:
        return self.op, self.part, self.sizes, self.detail

    @property
    def size(self) -> str:
        named = [f"{SIZES[name]} = {value}" for name, value in self.sizes if name in SIZES]
        return ", ".join([*named, self.detail])

    def get(self, name: str) -> int:
        return dict(self.sizes).get(name, 0)


@dataclass(frozen=True)
class Document:
    """A file of results: what was measured, where, when and at which commits."""

    path: Path
    hardware: str
    on_gpu: bool
    date: str
    commits: tuple[str, ...]
    records: tuple[Record, ...]
    ours: str  # the competitor that users get
    raw: dict[str, Any] = field(repr=False)

    def of(self, *ops: str) -> list[Record]:
        return [record for record in self.records if record.op in ops]


def path_to_write(text: str) -> Path:
    """The file that a flag names, for argparse; refused before anything is measured where its folder is missing."""
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{path}: there is no folder {path.parent}")
    return path


def save(path: Path, found: Any) -> None:
    part = path.with_suffix(".part")  # a process that is stopped while it writes leaves the file as it was
    part.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def load(path: Path) -> Document:
    """Raises ValueError where the file isn't one of results."""
    raw = json.loads(path.read_text(encoding="utf-8"))
    if not HOLDS & raw.keys():
        raise ValueError(f"{path} has neither benchmarks nor cases: write it with bench/gpu.py or --benchmark-json")
    benchmarks = raw.get("benchmarks", [])
    where = raw.get("machine") or raw.get("machine_info", {})
    method = raw.get("method", {})
    software = [*(entry["extra_info"] for entry in benchmarks), where]
    date = str(raw.get("date") or raw.get("datetime") or "")[:10]
    return Document(
        path=path,
        hardware=hardware(where),
        on_gpu=bool(where.get("gpu")),
        date=date,
        commits=tuple(dict.fromkeys(commit for info in software if (commit := commit_of(info)))),
        records=(*map(from_benchmark, benchmarks), *from_cases(raw.get("cases", []))),
        ours=method.get("default_schedule", "ours"),
        raw=raw,
    )


def load_all(folder: Path = RESULTS) -> list[Document]:
    """The files of benchmarks in a folder, in the order of their names: the CPU first. Others hold other things."""
    return [load(path) for path in sorted(folder.glob("*.json")) if HOLDS & json.loads(path.read_text("utf-8")).keys()]


def hardware(where: dict[str, Any]) -> str:
    if gpu := where.get("gpu"):
        driver = f", driver {where['driver']}" if where.get("driver") else ""
        return f"{gpu}{driver}, torch {where.get('torch')}, triton {where.get('triton')}"
    return f"{where.get('cpu', 'unknown CPU')}, {where.get('cores', '?')} cores, torch {where.get('torch')}"


def commit_of(software: dict[str, Any]) -> str:
    """What :func:`machine.describe_software` found, in short."""
    if not software.get("commit"):
        return ""
    return software["commit"][:7] + (" with uncommitted changes" if software.get("uncommitted_changes") else "")


def op_of(op: str, part: str) -> str:
    """An assignment is an op of its own."""
    return "assign_codes" if part == "assign" else op


def part_of(info: dict[str, Any]) -> str:
    """Part of a case, with its unusual settings."""
    part: str = info["part"]
    if part == "assign":
        return part
    part += ", CUDA graph" if info.get("graph") else ""
    part += "" if info.get("masked", True) else ", no noise"
    part += ", trained-like" if info.get("latents") == "trained-like" else ""
    return part + (", hard codebook gradient" if info.get("codebook_grad") == "hard" else "")


def sizes_of(info: dict[str, Any]) -> tuple[tuple[str, int], ...]:
    if info["op"] == "weighted_info_nce" and "width" in info:
        info = info | {"channels": info["width"], "width": None}
    return tuple((name, int(info[name])) for name in SIZES if info.get(name) is not None)


def from_benchmark(entry: dict[str, Any]) -> Record:
    """Of pytest-benchmark's JSON."""
    info = entry["extra_info"]
    return Record(
        op=op_of(info["op"], info["part"]),
        part=part_of(info),
        sizes=sizes_of(info),
        detail=info.get("dtype") or info["detail"],
        competitor=info["competitor"],
        ms=1e3 * entry["stats"]["median"],
        mib=info.get("peak_mib"),
        tflops=info.get("tflops"),
        share=info.get("share_of_matmul"),
        flops=info.get("flops"),
        bytes=info.get("bytes"),
    )


def from_cases(cases: Iterable[dict[str, Any]]) -> Iterable[Record]:
    """Of ``bench/gpu.py``'s cases."""
    for case in cases:
        matmul = case["results"].get("matmul", {}).get("ms")
        for name, result in case["results"].items():
            ms = result.get("ms")
            yield Record(
                op=op_of(case["op"], case["part"]),
                part=part_of(case),
                sizes=sizes_of(case),
                detail=case["dtype"],
                competitor=name,
                status=result["status"],
                ms=ms,
                mib=result.get("extra_mib"),
                tflops=result.get("tflops"),
                share=case["products"] * matmul / ms if matmul and ms else None,
                flops=case.get("flops"),
                bytes=case.get("bytes"),
            )


def by_case(records: Iterable[Record]) -> dict[tuple[Any, ...], dict[str, Record]]:
    """Records by case, and there by competitor."""
    cases: dict[tuple[Any, ...], dict[str, Record]] = {}
    for record in records:
        cases.setdefault(record.case, {})[record.competitor] = record
    return cases


def ratio(mine: Record | None, other: Record | None) -> float:
    """How many times as fast as ``other`` mine is; nan unless both have a time."""
    if mine is None or other is None or not mine.ms or not other.ms:
        return math.nan
    return other.ms / mine.ms


def against(case: dict[str, Record], mine: str, peer: str) -> float:
    """How many times as fast as a peer ours is at what the peer computes; nan unless both have a time."""
    return ratio(case.get(TWINS.get(peer, mine), case.get(mine)), case.get(peer))
