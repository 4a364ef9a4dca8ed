"""Tables and figures of an experiment, from the files of its rows."""

import csv
import io
import json
import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from regvq_fast.config import PresetName
from regvq_fast.evaluation.measurement import RESULTS
from regvq_fast.files import atomic_path
from regvq_fast.paper import costs, figures
from regvq_fast.paper.experiments import (
    PUBLISHED_DATASETS,
    ExperimentName,
    published_dataset,
)
from regvq_fast.paper.rows import Experiment, Published, Row
from regvq_fast.paper.stages import Pipeline
from regvq_fast.priors.registry import SAMPLING_SETTINGS

Plan = Mapping[Row, Mapping[int, Pipeline]]
"""Pipelines of each row, by seed."""

_AGREEMENT = ("agreement of samples", "layout of samples", "classes of samples")
"""Agreement of samples with their conditions, in runs on the scenes."""
_NAMES = {
    "fid_r": "FID[R]",
    "psnr": "PSNR[R]",
    "fid_g": "FID[G]",
    "ssim": "SSIM[R]",
    "perceptual": "perceptual[R]",
    "utilization": "codes used",
    "perplexity": "perplexity",
    **dict.fromkeys(_AGREEMENT),
    **costs.NAMES,
}
"""Columns in order; None: the metric's own name."""
_FRACTIONS = frozenset({"utilization", *_AGREEMENT, *costs.FRACTIONS})
_PROTOCOL = ("fingerprint", "split", "images", "image_size", "precision", "features_sha256", "network_sha256")
_SAME = (*_PROTOCOL, *SAMPLING_SETTINGS)
"""Parts of the protocol that compared numbers must share."""


class Cell(NamedTuple):
    """A metric of a row over its seeds."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    def text(self, key: str) -> str:
        """Return the mean and, of several seeds, the standard deviation."""
        form = figures.percent if key in _FRACTIONS else "{:,.0f}".format if key in costs.COUNTS else _number
        if len(self.values) < 2 or key in costs.EQUAL or not all(map(math.isfinite, self.values)):
            return form(self.mean)
        return f"{form(self.mean)} ± {form(statistics.stdev(self.values)).removesuffix(' %')}"


class Report:
    """The table and the figures of an experiment; unfinished rows are left out.

    Args:
        experiment, name: of the report.
        preset: of the data.
        out: folder of the report.
        plan: of the rows.
    """

    def __init__(self, experiment: Experiment, name: ExperimentName, preset: PresetName, out: Path, plan: Plan) -> None:
        self.experiment, self.name, self.preset, self.out, self.plan = experiment, name, preset, out, plan

    def measured(self) -> dict[Row, dict[int, dict[str, dict[str, Any]]]]:
        """Return name, value and protocol by row, seed and metric, without the metrics of unfinished priors.

        Raises:
            ValueError: numbers with different protocols.
        """
        found: dict[Row, dict[int, dict[str, dict[str, Any]]]] = {}
        for row, by_seed in self.plan.items():
            for seed, pipeline in by_seed.items():
                if result := pipeline.measured():
                    metrics = json.loads(result.read_bytes()) | _agreement(result.parent)
                    if self.experiment.with_costs:
                        metrics |= costs.costs(pipeline, metrics["utilization"]["codes"])
                    found.setdefault(row, {})[seed] = metrics
        first: dict[tuple[str, str], Any] = {}
        for row, seeds in found.items():
            for seed, metrics in seeds.items():
                for key, metric in metrics.items():
                    for name in _SAME:
                        if first.setdefault((key, name), metric.get(name)) != metric.get(name):
                            raise ValueError(
                                f"{metric['name']} of {row.name}, seed {seed}, was measured with another {name} "
                                f"({metric.get(name)}) than the rows before ({first[key, name]}): delete its {RESULTS} "
                                "to measure it again"
                            )
        return found

    # ----------------------------------------------------------------------------------------------------------- tables

    def write_table(self) -> None:
        """Write NAME.md, NAME.csv (a line per row and seed) and NAME.json (with protocols, commands and seconds)."""
        measured = self.measured()
        header, lines = self._table(measured)
        rows = [header, ["---"] * len(header), *lines]
        markdown = "\n".join(f"| {' | '.join(line)} |" for line in rows)
        self._write(".md", f"# {self.experiment.title}\n\n{markdown}\n\n{self._protocol(measured)}\n")

        keys = _keys(measured)
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(["row", "seed", *keys])
        for row, seeds in measured.items():
            for seed, metrics in seeds.items():
                table.writerow([row.name, seed, *(metrics[key]["value"] if key in metrics else "" for key in keys)])
        self._write(".csv", text.getvalue())

        details = {
            row.name: {
                str(seed): {**_hoisted(metrics), "stages": self.plan[row][seed].record()}
                for seed, metrics in seeds.items()
            }
            for row, seeds in measured.items()
        }
        self._write(".json", json.dumps(details, indent=1, ensure_ascii=False) + "\n")

    def _table(self, measured: Mapping[Row, Mapping[int, Any]]) -> tuple[list[str], list[list[str]]]:
        """Return the header and the lines, with the paper's numbers if it has them."""
        keys = _keys(measured)
        dataset = published_dataset(self.preset)
        published = any(dataset in row.published for row in measured)
        header = ["", *(_name(key, measured) for key in keys)]
        if published:
            header += [f"paper: {name}" for name in ("FID[R]", "PSNR[R]", "FID[G]")]
        lines = []
        for row, seeds in measured.items():
            line = [row.name]
            for key in keys:
                cell = _cell(seeds, key)
                line.append("" if cell is None else cell.text(key))
            if published:
                numbers: Published | None = row.published.get(dataset)
                line += ["", "", ""] if numbers is None else [f"{number:.2f}" for number in numbers]
            lines.append(line)
        return header, lines

    def _protocol(self, measured: Mapping[Row, Mapping[int, Any]]) -> str:
        """Describe in a few sentences how the numbers were measured."""
        runs = [metrics for seeds in measured.values() for metrics in seeds.values()]
        if not runs:
            return "No row is done yet."
        counts = sorted({len(seeds) for seeds in measured.values()})
        seeds = " to ".join(map(str, counts)) + (" seed" if counts == [1] else " seeds")
        psnr, fid = runs[0]["psnr"], runs[0].get("fid_r", {})
        text = f"{psnr['images']} validation images of {psnr['image_size']} px, {seeds} a row"
        text += ", means ± standard deviations of the seeds." if counts != [1] else "."
        if fid:
            kind = "FID" if fid["name"].startswith("FID") else "FD, Fréchet distance"
            text += f" {kind}: features of {fid['features']} ({fid['features_sha256']})."
        if "network" in (perceptual := runs[0].get("perceptual", {})):
            text += f" Perceptual: {perceptual['name']} ({perceptual['network_sha256']})."
        text += f" Device: {psnr['device']}; torch {psnr['versions']['torch']}."
        if self.experiment.with_costs:
            memory = (
                "of the process that trains, PyTorch included" if psnr["device"].startswith("CPU") else "of the GPU"
            )
            text += f" Seconds a step: medians of the tokenizer's training. Memory: {memory}."
        if any((dataset := published_dataset(self.preset)) in row.published for row in measured):
            text += f" Paper: on {PUBLISHED_DATASETS[dataset]}."
            if self.preset != dataset:
                text += " That is another data set: compare the order of the rows, not the values."
        return text

    def show(self, console: Console) -> None:
        """Print the table and the paths of the files."""
        header, lines = self._table(self.measured())
        table = Table(title=Text(self.experiment.title), title_justify="left")
        columns = [header, *lines]  # transposed: a terminal is too narrow for a column per metric
        for name in (column[0] for column in columns):
            table.add_column(Text(name), overflow="fold")
        for line in list(zip(*columns, strict=True))[1:]:
            table.add_row(*map(Text, line))
        console.print(table)
        for path in sorted(self.out.glob(f"{self.name}*")):
            console.print(f"  {path}", highlight=False, soft_wrap=True)

    # ---------------------------------------------------------------------------------------------------------- figures

    def write_figures(self, device: torch.device) -> None:
        """Write NAME-reconstructions.png, -samples.png (with a prior), -codebooks.png, -usage.png; sweeps -curves.png.

        Images are of the first seed of each finished row; `Experiment.shown` may restrict the rows.
        """
        measured = self.measured()
        if not measured:
            return
        shown = {row: min(seeds) for row, seeds in measured.items() if self.experiment.shown in (None, row.x)}
        images = next(iter(next(iter(measured.values())).values()))["psnr"]["images"]
        if shown:
            pipelines = {row.name: self.plan[row][seed] for row, seed in shown.items()}
            figures.save_row_figures(self.out / self.name, pipelines, images, device)
        if self.experiment.axis:
            curves = {
                _name(key, measured): {
                    series: [
                        (row.x, cell.values)
                        for row, seeds in measured.items()
                        if row.series == series and row.x is not None and (cell := _cell(seeds, key)) is not None
                    ]
                    for series in dict.fromkeys(row.series for row in measured)
                }
                for key in _keys(measured)
                if key not in costs.EQUAL
            }
            figures.save_curves(self._path("-curves.png"), curves, self.experiment.axis)

    def _path(self, suffix: str) -> Path:
        return self.out / f"{self.name}{suffix}"

    def _write(self, suffix: str, text: str) -> None:
        with atomic_path(self._path(suffix)) as temporary:
            temporary.write_text(text, encoding="utf-8")


def _hoisted(metrics: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return metrics with the common part of their protocols moved out."""
    protocols = [metric for metric in metrics.values() if metric.keys() > {"name", "value"}]
    common = {
        name: value
        for name, value in protocols[0].items()
        if name not in ("name", "value") and all(protocol.get(name) == value for protocol in protocols)
    }
    own = {key: {name: metric[name] for name in metric if name not in common} for key, metric in metrics.items()}
    return {"protocol": common, "metrics": own}


def _agreement(prior: Path) -> dict[str, dict[str, Any]]:
    """Return the agreement of a prior's samples with their conditions, if its run measured it."""
    try:
        summary = json.loads((prior / "summary.json").read_bytes())
    except FileNotFoundError:
        return {}
    return {key: {"name": key, "value": summary[key]} for key in _AGREEMENT if key in summary}


def _keys(measured: Mapping[Row, Mapping[int, Any]]) -> list[str]:
    """Return the metrics that any row has, in the order of columns."""
    present = {key for seeds in measured.values() for metrics in seeds.values() for key in metrics}
    return [key for key in _NAMES if key in present]


def _name(key: str, measured: Mapping[Row, Mapping[int, Any]]) -> str:
    """Return the short name of a metric: FD instead of FID if the features are not Inception's."""
    full = next(metrics[key]["name"] for seeds in measured.values() for metrics in seeds.values() if key in metrics)
    name = _NAMES[key] or key
    return name if full.startswith("FID") else name.replace("FID", "FD")


def _cell(seeds: Mapping[int, Any], key: str) -> Cell | None:
    values = [metrics[key]["value"] for metrics in seeds.values() if key in metrics]
    return Cell(tuple(math.nan if value is None else float(value) for value in values)) if values else None


def _number(value: float) -> str:
    """Return a number with at least three digits, and at most two decimals from 1 on."""
    return f"{value:.3f}" if abs(value) < 1 else f"{value:.2f}" if abs(value) < 100 else f"{value:.0f}"
