"""Figures of an experiment: reconstructions and samples of its rows, code usage, curves of a sweep."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from regvq_fast import number_formats
from regvq_fast.config import VQGANConfig, read_config
from regvq_fast.data.datasets import build_dataset
from regvq_fast.data.loading import read_samples
from regvq_fast.data.transforms import to_float, to_uint8
from regvq_fast.evaluation.codebook import perplexity, utilization
from regvq_fast.evaluation.measurement import CODE_COUNTS
from regvq_fast.files import atomic_path
from regvq_fast.image_grids import color_map
from regvq_fast.models.hub import PICTURES
from regvq_fast.models.vqgan import VQGAN
from regvq_fast.paper.stages import Pipeline, Stage
from regvq_fast.precision import choose_precision
from regvq_fast.priors.conditions import fields_of
from regvq_fast.priors.images import ImageSampler
from regvq_fast.priors.registry import PRIORS, SamplingConfig

_SHOWN = 8  # images a row
_COLORS = ("#3b6ea8", "#c0504d", "#5b8c3e", "#8064a2", "#d98b2b", "#4bacc6", "#7f7f7f")


def save_row_figures(stem: Path, pipelines: Mapping[str, Pipeline], images: int, device: torch.device) -> None:
    """Save STEM-reconstructions.png, STEM-codebooks.png, STEM-usage.png and, of rows with a prior, STEM-samples.png.

    Args:
        stem: beginning of the names.
        pipelines: finished rows, by name.
        images: number of validation images in the measurements.
        device: for the models.

    Raises:
        FileNotFoundError: an older version, which saved no code counts, measured a row; or they were removed.
    """
    stages = {name: pipeline.by_name() for name, pipeline in pipelines.items()}
    config = read_config(next(iter(stages.values()))["tokenizer"].folder, VQGANConfig)
    size = config.data.image_size
    samplers = {
        name: _sampler(of_row["prior"], device)
        for name, of_row in stages.items()
        if "prior" in of_row and of_row["prior"].result.exists()
    }
    fields = sorted({field for sampler in samplers.values() for field in fields_of(sampler.condition)})
    dataset: Any = build_dataset(
        config.data.data, split="val", image_size=size, length=images, seed=0, fields=tuple(fields)
    )
    shown = read_samples(dataset, range(min(_SHOWN, len(dataset))))

    rebuilt: dict[str, Tensor] = {"original": shown["image"]}
    counts: dict[str, Tensor] = {}
    codebooks: dict[str, Path] = {}
    for name, of_row in stages.items():
        folder = of_row["tokenizer"].folder
        model = VQGAN.from_pretrained(folder).to(device)
        rebuilt[name] = _reconstruct(model, shown["image"], device)
        if (measured := pipelines[name].measured()) is None:
            raise FileNotFoundError(f"the measurements of {folder} were removed; run the same command again")
        counts[name] = _counts(measured)
        codebooks[name] = folder / PICTURES / "codebook.png"
    save_rows(_named(stem, "reconstructions"), rebuilt)
    save_codebooks(_named(stem, "codebooks"), codebooks, counts)
    save_usage(_named(stem, "usage"), counts)
    if samplers:
        rows = {"image": shown["image"]}
        if "segmentation" in shown:
            rows = {"map": color_map(shown["segmentation"], (size, size))} | rows
        rows |= {name: sampler.sample(shown, 0).cpu() for name, sampler in samplers.items()}
        save_rows(_named(stem, "samples"), rows)


def save_rows(path: Path, rows: Mapping[str, Tensor]) -> None:
    """Save rows of images (B, 3, H, W) uint8, each below its name."""
    width = max(10.0, 1.25 * max(map(len, rows.values())))
    figure = Figure(figsize=(width, (width / _SHOWN + 0.22) * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    for k, (name, images) in enumerate(rows.items(), 1):
        axes = figure.add_subplot(len(rows), 1, k)
        strip = torch.nn.functional.pad(images.cpu(), (1, 1), value=255).permute(2, 0, 3, 1).flatten(1, 2)
        axes.imshow(strip.numpy(), interpolation="nearest")
        axes.set_title(name, fontsize=9, loc="left", pad=2)
        axes.axis("off")
    _save(figure, path)


def save_codebooks(path: Path, mosaics: Mapping[str, Path], counts: Mapping[str, Tensor]) -> None:
    """Save the mosaics of codebooks side by side."""
    columns = 3 if len(mosaics) % 3 == 0 else min(4, len(mosaics))
    lines = math.ceil(len(mosaics) / columns)
    figure = Figure(figsize=(3.6 * columns, 3.9 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    for k, (name, mosaic) in enumerate(mosaics.items(), 1):
        axes = figure.add_subplot(lines, columns, k)
        with Image.open(mosaic) as image:
            axes.imshow(np.asarray(image.convert("RGB")))
        axes.set_title(f"{name}\n{_used(counts[name])}", fontsize=9)
        axes.axis("off")
    _save(figure, path)


def save_usage(path: Path, counts: Mapping[str, Tensor]) -> None:
    """Plot the frequencies of codes relative to uniform usage, from the most to the least frequent.

    Args:
        path: of the image.
        counts: (N,) by name; N may differ.
    """
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for k, (name, count) in enumerate(counts.items()):
        frequency = (count.double().sort(descending=True).values / count.sum() * len(count)).numpy()
        rank = (np.arange(len(frequency)) + 1) / len(frequency)
        used = frequency > 0
        axes.plot(rank[used], frequency[used], **_style(k), label=f"{name}: {_used(count)}")
    axes.axhline(1, color="black", linestyle=":", linewidth=1)
    axes.set_yscale("log")
    axes.set_xlim(0, 1)
    axes.set_xlabel("fraction of the codes, from the most to the least frequent")
    axes.set_ylabel("frequency relative to uniform usage")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    _save(figure, path)


def save_curves(
    path: Path, metrics: Mapping[str, Mapping[str, Sequence[tuple[float, tuple[float, ...]]]]], axis: str
) -> None:
    """Plot one panel per metric and one curve per series: means over seeds, and each seed as a point.

    Args:
        path: of the image.
        metrics: by metric and series: pairs of x and the values of all seeds.
        axis: label of the x-axis, which is logarithmic if x spans a factor of 8 or more.
    """
    columns = min(3, len(metrics))
    lines = math.ceil(len(metrics) / columns)
    figure = Figure(figsize=(4.2 * columns, 3.1 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    for panel, (name, by_series) in enumerate(metrics.items(), 1):
        axes = figure.add_subplot(lines, columns, panel)
        for k, (series, points) in enumerate(by_series.items()):
            means = [float(np.mean(values)) for _, values in points]
            axes.plot([x for x, _ in points], means, **_style(k), label=series)
            for x, values in points:
                axes.plot([x] * len(values), values, ".", color=_style(k)["color"], markersize=7)
        ticks = sorted({x for points in by_series.values() for x, _ in points})
        if ticks and ticks[0] > 0 and ticks[-1] >= 8 * ticks[0]:
            axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
        axes.minorticks_off()
        axes.set_title(name, fontsize=10)
        axes.set_xlabel(axis)
        axes.spines[["top", "right"]].set_visible(False)
    handles, names = axes.get_legend_handles_labels()
    if len(names) > 1:
        figure.legend(handles, names, loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    _save(figure, path)


def _sampler(prior: Stage, device: torch.device) -> ImageSampler:
    (name,) = (name for name, entry in PRIORS.items() if entry.command == prior.command)
    settings = SamplingConfig(**PRIORS[name].sampler.preview_settings)
    return ImageSampler.from_run(prior.folder, settings, choose_precision(False, device), name)


@torch.no_grad()
def _reconstruct(model: VQGAN, images: Tensor, device: torch.device) -> Tensor:
    return to_uint8(model(to_float(images.to(device))).reconstruction).cpu()


def _counts(metrics: Path) -> Tensor:
    """Return the number of selections of each code (N,) in a row's evaluation."""
    path = metrics.with_name(CODE_COUNTS)
    try:
        return torch.tensor(json.loads(path.read_bytes()))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing: delete {metrics}, and measure the row again") from None


def _used(counts: Tensor) -> str:
    used = percent(float(utilization(counts)))
    return f"{used} of {len(counts):,} codes, perplexity {float(perplexity(counts)):,.1f}"


def percent(fraction: float) -> str:
    """Return a fraction as a percentage with one decimal; only 1 gives 100.0 %."""
    return number_formats.percent(fraction, ".1f")


def _style(k: int) -> dict[str, Any]:
    """Return colour and line of curve k, distinct for twice as many curves as colours."""
    return {"color": _COLORS[k % len(_COLORS)], "linestyle": "-" if k < len(_COLORS) else "--"}


def _named(stem: Path, what: str) -> Path:
    return stem.with_name(f"{stem.name}-{what}.png")


def _save(figure: Figure, path: Path) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)
