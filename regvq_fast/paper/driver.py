"""``regvq paper``: train, measure and compare the rows of an experiment."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from rich.console import Console
from rich.text import Text
from tyro.conf import Positional

from regvq_fast.config import PresetName
from regvq_fast.config.runtime import CompileConfig, DeviceConfig
from regvq_fast.data.datasets import build_dataset
from regvq_fast.data.samples import Split
from regvq_fast.evaluation.feature_nets import load_feature_net
from regvq_fast.evaluation.measurement import RESULTS
from regvq_fast.models.features import RANDOM
from regvq_fast.paper.commands import Commands
from regvq_fast.paper.experiments import (
    EXPERIMENTS,
    ExperimentName,
    prior_of,
    recipe,
)
from regvq_fast.paper.report import Report
from regvq_fast.paper.rows import Experiment, Recipe, Row, Scale
from regvq_fast.paper.stages import Pipeline, Stage
from regvq_fast.precision import inference_device
from regvq_fast.priors.conditions import fields_of
from regvq_fast.priors.registry import PRIORS, PriorName
from regvq_fast.settings import check_at_least

_OUT = Path("runs/paper")  # not the repository's results/, whose tables have more seeds
_RUNS = "runs"
_SMALL = 16  # side in pixels of images that are only opened; the smallest of the scenes


@dataclass(frozen=True)
class PaperConfig(CompileConfig, DeviceConfig):
    """A run of ``regvq paper``."""

    experiment: Positional[ExperimentName]
    """Table or sweep."""
    preset: Literal["scenes", "ade20k", "celebahq", "cub200", "coco"] = "scenes"
    """Data set; at scale full also its settings."""
    scale: Scale = "tiny"
    """tiny: minutes per row, even on a CPU. full: the paper's sizes (scenes: 128 px), for GPUs."""
    data: Path | None = None
    """Images of the preset (any images for quantizers), as for regvq train vq. Default: the embedded scenes."""
    out: Path | None = None
    """Folder of tables, figures and runs/. Default: runs/paper/DATA-SCALE."""
    seeds: tuple[int, ...] = (0,)
    """Seeds; each row is trained once per seed and reports mean and standard deviation."""
    rows: tuple[str, ...] = ()
    """Rows to run, by name, folder name or curve of the sweep. Default: all."""
    prior: Literal["preset", "none"] | PriorName = "preset"
    """Prior for FID[G]; preset: the paper's for this data, none in sweeps."""
    fid_features: str = "inception"
    """Features of FID, as in regvq evaluate; random-vgg16 needs no file."""
    perceptual_weights: Path | None = None
    """VGG-16 weights of training and LPIPS, as in regvq train vq."""
    contrastive_weights: Path | None = None
    """VGG-19 weights of the contrastive loss at scale full, as in regvq train vq."""
    jobs: int = 1
    """Rows run in parallel; they divide the cores among them."""
    processes: int = 1
    """GPUs per row; more than one uses torchrun."""
    report_only: bool = False
    """Run nothing; write tables and figures of finished rows."""


def reproduce(config: PaperConfig) -> None:
    """Run or resume every row of an experiment, and write its table and figures.

    Args:
        config: of the run.

    Raises:
        ValueError, OSError: the settings can't be used, before anything runs; or a command failed.
    """
    experiment = EXPERIMENTS[config.experiment]
    chosen = _check(config, experiment)
    data = config.data.name if experiment.own_recipe and config.data else config.preset
    out = config.out or _OUT / f"{data}-{config.scale}"
    # The report covers all rows that exist, not only those of this call.
    plan = {
        row: {seed: _plan(config, experiment, row, seed, out / _RUNS) for seed in _seeds(config, out / _RUNS / row.key)}
        for row in experiment.rows[config.scale]
    }
    for by_seed in plan.values():
        for pipeline in by_seed.values():
            pipeline.check()

    console = Console()
    report = Report(experiment, config.experiment, config.preset, out, plan)
    if config.report_only and not report.measured():
        raise ValueError(
            f"{out} has no finished row of {config.experiment}: leave out --report-only, or give another --out"
        )
    if not config.report_only:
        # One seed of all rows first, so that a table that is stopped early has all rows.
        work = {
            f"{row.name}, seed {seed} (row {k} of {len(chosen)})": plan[row][seed]
            for seed in config.seeds
            for k, row in enumerate(chosen, 1)
        }
        _run(config, work, report, console)
    report.write_table()
    report.write_figures(inference_device(config.device))
    report.show(console)


def _run(config: PaperConfig, work: Mapping[str, Pipeline], report: Report, console: Console) -> None:
    """Run the missing stages of pipelines by title, and write the table after each pipeline."""

    def finish(title: str, pipeline: Pipeline) -> None:
        for stage in pipeline.stages:
            if stage.result.exists() or commands.stopping:
                continue
            console.print(Text.assemble("\n" * (config.jobs == 1), (f"{title}: {stage.name}", "bold")), soft_wrap=True)
            pipeline.run(stage, _how(config, stage), commands, config.processes)

    with Commands(config.jobs) as commands, ThreadPoolExecutor(config.jobs) as pool:
        try:
            for row in as_completed([pool.submit(finish, title, pipeline) for title, pipeline in work.items()]):
                row.result()
                report.write_table()
        except BaseException:
            commands.stopping = True  # other rows finish their current stage
            raise
    for title, pipeline in work.items():
        for stage in pipeline.stages:
            if not stage.result.exists():
                raise FileNotFoundError(
                    f"{title}: {stage.result} of the {stage.name} was removed; run the same command again"
                )


def _check(config: PaperConfig, experiment: Experiment) -> list[Row]:
    """Return the rows to run; ValueError or OSError if the settings can't be used."""
    check_at_least(1, {"--jobs": config.jobs, "--processes": config.processes, "--seeds": len(config.seeds)})
    if experiment.own_recipe and config.preset != "scenes":
        raise ValueError(f"{config.experiment} has its own settings: leave out --preset {config.preset}")
    if not experiment.own_recipe and config.preset == "scenes" and config.data is not None:
        raise ValueError(f"--data {config.data} needs the preset of its data set: give --preset")
    if config.preset != "scenes" and config.data is None:
        raise ValueError(f"--preset {config.preset} needs its images: give their folder with --data PATH")
    for flag, path in (
        ("--perceptual-weights", config.perceptual_weights),
        ("--contrastive-weights", config.contrastive_weights),
    ):
        if path not in (None, RANDOM) and not path.exists():
            raise ValueError(f"{flag} {path} does not exist: give a file of weights, or {RANDOM}")
    rows = experiment.rows[config.scale]
    known = [name for row in rows for name in _names(row)]
    if unknown := [name for name in config.rows if name not in known]:
        raise ValueError(
            f"{config.experiment} has no row {unknown[0]!r}; its rows are {', '.join(repr(row.name) for row in rows)}"
        )
    prior = _prior(config, experiment)
    if config.fid_features == "none" and prior != "none":
        raise ValueError("--fid-features none leaves nothing to judge a prior by: give --prior none as well")
    if not config.report_only:  # missing files are errors now, not after the first row's training
        if config.fid_features != "none":
            load_feature_net(config.fid_features)
        if prior != "none":
            _check_prior(_recipe(config, experiment).preset, prior)
        unconditional = prior == "none" or _recipe(config, experiment).unconditional
        condition = () if unconditional else fields_of(PRIORS[prior].sampler.conditions[0])
        for split in get_args(Split):
            build_dataset(config.data, split=split, image_size=_SMALL, fields=condition)
    return [row for row in rows if not config.rows or not _names(row).isdisjoint(config.rows)]


def _names(row: Row) -> set[str]:
    """Return the names of a row that --rows accepts."""
    return {row.name, row.key, row.series} - {""}


def _recipe(config: PaperConfig, experiment: Experiment) -> Recipe:
    if experiment.own_recipe:
        return experiment.own_recipe(config.scale, config.data is None)
    return recipe(config.preset, config.scale)


def _check_prior(preset: PresetName, prior: PriorName) -> None:
    """Raise ValueError or OSError if the prior has no settings for the data, or its files are missing."""
    presets = PRIORS[prior].presets
    if preset not in presets:
        raise ValueError(f"--prior {prior} has no settings for --preset {preset}, only for {', '.join(presets)}")
    PRIORS[prior].recipe.check_files(presets[preset])


def _prior(config: PaperConfig, experiment: Experiment) -> str:
    """Return the name of the prior in PRIORS, or "none"."""
    if config.prior != "preset":
        return config.prior
    return prior_of(config.preset) if experiment.with_prior else "none"


def _seeds(config: PaperConfig, runs: Path) -> list[int]:
    """Return the seeds of this call and of earlier runs of a row."""
    earlier = {int(name) for path in runs.glob("seed-*") if (name := path.name.removeprefix("seed-")).isdigit()}
    return sorted(earlier | set(config.seeds))


def _plan(config: PaperConfig, experiment: Experiment, row: Row, seed: int, runs: Path) -> Pipeline:
    """Return the stages of a row with a seed."""
    of_scale = _recipe(config, experiment)
    prior = _prior(config, experiment)
    folder = runs / row.key / f"seed-{seed}"
    data = () if config.data is None else ("--data", str(config.data))
    weights = () if config.perceptual_weights is None else ("--perceptual-weights", str(config.perceptual_weights))
    contrastive: tuple[str, ...] = ()
    if config.contrastive_weights is not None and "none" not in row.flags:
        contrastive = ("--contrastive-weights", str(config.contrastive_weights))
    preset, seeded = ("--preset", of_scale.preset), ("--seed", str(seed))
    tokenizer = Stage(
        "tokenizer",
        "train vq",
        (*preset, *data, *of_scale.tokenizer, *weights, *contrastive, *row.flags, *seeded),
        folder / "vq",
        folder / "vq" / "summary.json",
        trains=True,
    )
    planned = [tokenizer]
    judged = tokenizer.folder
    evaluated: tuple[str, ...] = ("--run", str(judged))
    if prior != "none":
        unconditional = of_scale.unconditional
        fields: tuple[str, ...] = ()
        if config.data is not None and not unconditional:
            fields = ("--fields", PRIORS[prior].sampler.conditions[0])
        condition = ("--condition", "none") if unconditional else ()
        cache = Stage(
            "token cache",
            "tokens",
            ("--tokenizer", str(tokenizer.folder), *data, *fields, *of_scale.cache),
            folder / "tokens",
            folder / "prior" / "config.json",  # regvq tokens leaves a complete cache unchanged
            trains=False,
        )
        trained = Stage(
            "prior",
            PRIORS[prior].command,
            (*preset, "--cache", str(cache.folder), *condition, *of_scale.prior, *seeded),
            folder / "prior",
            folder / "prior" / "summary.json",
            trains=True,
        )
        planned += [cache, trained]
        judged = trained.folder
        evaluated += ("--prior-run", str(judged))
        if config.scale == "tiny":
            for name, value in PRIORS[prior].sampler.preview_settings.items():
                evaluated += (f"--{name.replace('_', '-')}", str(value))
    count = () if of_scale.val_images is None else ("--val-images", str(of_scale.val_images))
    settings = (*evaluated, *data, *count, "--fid-features", config.fid_features, *weights)
    name = "metrics" if prior == "none" else "metrics with prior"
    planned.append(Stage(name, "evaluate", settings, judged, judged / RESULTS, trains=False))
    return Pipeline(folder, tuple(planned))


def _how(config: PaperConfig, stage: Stage) -> list[str]:
    """Return the flags of speed, all of them explicit: a resumed stage would keep its earlier ones."""
    flags = ["--device", config.device, "--amp" if config.amp else "--no-amp"]
    if stage.trains or stage.command == "evaluate":
        flags.append("--compile" if config.compile else "--no-compile")
    return flags
