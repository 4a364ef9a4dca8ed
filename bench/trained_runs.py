"""Make the README's tables of trained models out of finished runs on the embedded scenes.

    python bench/trained_runs.py main-job --reg-vq runs/a runs/b runs/c --vq-gan runs/d runs/e runs/f --json FILE
    python bench/trained_runs.py priors --vq runs/vq --ar runs/ar --diffusion runs/diffusion --json FILE

The pages have bench/results/cpu-main-job.json and cpu-priors.json. Numbers are those of the runs' summaries; measured
here is what chance finds of a caption. Run it on the checkout that trained them.
"""

import argparse
import datetime
import json
import statistics
from pathlib import Path
from typing import Any

import measuring
from report import percent

from regvq_fast.data.loading import collate
from regvq_fast.models import VQGAN
from regvq_fast.scenes import CLASSES, RegionClassifier, ScenesDataset, caption_accuracy, evaluation

OTHER_CAPTIONS = 1500  # scenes that are read against captions of others
COLUMNS = {
    "codebook utilization": ("utilization", percent),
    "perplexity": ("perplexity", "{:.1f}".format),
    "PSNR, dB": ("psnr", "{:.1f}".format),
    "SSIM": ("ssim", "{:.3f}".format),
    "minutes": ("minutes", "{:.1f}".format),
}


def summary_of(run: Path) -> dict[str, Any]:
    """Return a run's summary, with its seed."""
    if not (run / "summary.json").is_file():
        raise SystemExit(f"{run} is no finished run: it has no summary.json; train it to the end")
    found: dict[str, Any] = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    if "minutes" not in found:
        raise SystemExit(f"{run} has no time of the whole run; train it in one go, not with --resume")
    return found | {"seed": json.loads((run / "config.json").read_text(encoding="utf-8"))["run"]["seed"]}


def main_job(runs: dict[str, list[Path]]) -> dict[str, Any]:
    """Return the table of runs of each quantizer; they must differ in seed and quantizer alone."""
    found = {name: [summary_of(run) for run in folders] for name, folders in runs.items()}
    for name, entries in found.items():
        if wrong := [run["quantizer"] for run in entries if run["quantizer"] != name]:
            raise SystemExit(f"--{name} got runs of {', '.join(wrong)}; give runs of --quantizer {name}")
    seeds = {tuple(run["seed"] for run in entries) for entries in found.values()}
    if len(seeds) > 1:
        raise SystemExit(f"the quantizers have seeds {sorted(seeds)}; give both the same seeds, in the same order")
    rows = []
    for name, entries in found.items():
        cells = []
        for column, form in COLUMNS.values():
            values = [run[column] for run in entries]
            spread = f" ± {form(statistics.stdev(values))}" if len(values) > 1 else ""
            cells.append(form(statistics.mean(values)) + spread)
        rows.append([f"`{name}`", *cells])
    table = {"head": ["quantizer", *COLUMNS], "rows": rows, "more": f"seeds {', '.join(map(str, seeds.pop()))}"}
    return {"tables": {"main-job": table}, "runs": found}


def other_captions(vq: Path) -> dict[str, float]:
    """Return what is found of captions in scenes of other captions: the level of chance."""
    size = VQGAN.from_pretrained(vq).image_size
    classifier = RegionClassifier.fit(ScenesDataset("train", size), evaluation.FITTED_TO, len(CLASSES))
    scenes = ScenesDataset("val", size, OTHER_CAPTIONS)
    batch = collate([scenes[k] for k in range(len(scenes))])
    found = caption_accuracy(classifier, batch["image"], [*batch["caption"][1:], batch["caption"][0]])
    return {"layout of scenes of other captions": found.layout, "classes of scenes of other captions": found.classes}


def priors(vq: Path, ar: Path, diffusion: Path) -> dict[str, Any]:
    """Return the tables of both priors of one tokenizer."""
    runs = {"tokenizer": summary_of(vq), "ar": summary_of(ar), "diffusion": summary_of(diffusion) | other_captions(vq)}
    more, ours, text = f"`train/vq.py --seed {runs['tokenizer']['seed']}`", runs["ar"], runs["diffusion"]
    shown = ("scenes", "reconstructions", "samples")
    cells = [*(percent(ours[f"agreement of {name}"]) for name in shown), percent(1 / len(CLASSES))]
    head = ["scenes", "their reconstructions by the tokenizer", "samples of `train/ar.py`", "chance"]
    agreement = {"head": head, "rows": [cells], "more": more}
    names = (*shown, "scenes of other captions")
    rows = [[what, *(percent(text[f"{what} of {name}"]) for name in names)] for what in ("layout", "classes")]
    head = ["scenes", "their reconstructions", "samples of `train/diffusion.py`", "scenes of other captions"]
    images = min(text["images"], evaluation.CLASSIFIED)
    obeyed = {"head": [f"found, of {images}", *head], "rows": rows, "more": more}
    return {"tables": {"agreement": agreement, "captions-obeyed": obeyed}, "runs": runs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    job = kinds.add_parser("main-job", help="runs of train/vq.py, several seeds of two quantizers")
    for name in ("reg-vq", "vq-gan"):
        job.add_argument(f"--{name}", type=Path, nargs="+", required=True, metavar="RUN")
    both = kinds.add_parser("priors", help="a run of train/ar.py and one of train/diffusion.py, and their tokenizer")
    for name in ("vq", "ar", "diffusion"):
        both.add_argument(f"--{name}", type=Path, required=True, metavar="RUN")
    for each in (job, both):
        each.add_argument("--json", type=Path, required=True, metavar="FILE", help="file to write")
    given = parser.parse_args()
    where = {"machine": measuring.describe_machine("cpu"), "date": str(datetime.date.today())}
    if given.kind == "main-job":
        found = main_job({"reg-vq": given.reg_vq, "vq-gan": given.vq_gan})
    else:
        found = priors(given.vq, given.ar, given.diffusion)
    given.json.write_text(json.dumps(where | found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
