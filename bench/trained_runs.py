"""What finished runs on the embedded scenes reached, as the results that the pages' tables are made of.

    python bench/trained_runs.py main-job --reg-vq runs/a runs/b runs/c --vq-gan runs/d runs/e runs/f --json FILE
    python bench/trained_runs.py priors --vq runs/vq --ar runs/ar --diffusion runs/diffusion --json FILE

The pages have bench/results/cpu-main-job.json and cpu-priors.json. Numbers are those of the runs' summaries; of the
diffusion prior, what its captions tell it is measured here, in two minutes. Run it on the checkout that trained them.
"""

import argparse
import datetime
import json
from pathlib import Path
from typing import Any

import machine
import records
import torch
import torch.nn.functional as F

from regvq_fast.data import ScenesDataset, TokenDataset
from regvq_fast.data.loading import collate
from regvq_fast.data.scenes import CLASSES
from regvq_fast.evaluation.agreement import RegionClassifier
from regvq_fast.evaluation.captions import caption_accuracy
from regvq_fast.models import VQGAN, VQDiffusion
from regvq_fast.training import prior as prior_training

SHARES = (1.0, 0.75, 0.5, 0.25)  # of tokens that are masked
MASKED_IMAGES = 256
OTHER_CAPTIONS = 1500  # scenes that are read against captions of others
QUALITY = ("psnr", "ssim", "utilization", "perplexity", "images", "minutes")


def read(run: Path, name: str) -> dict[str, Any]:
    """``config.json`` or ``summary.json`` of a run."""
    path = run / name
    if not path.is_file():
        raise SystemExit(f"{path} is not there: {run} is no run of train/ that has finished")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if name == "summary.json" and "minutes" not in found:
        raise SystemExit(f"{path} has no time of the whole run: train it in one go, not with --resume")
    return found


def tokenizer(run: Path) -> dict[str, Any]:
    """Seed, codes and quality of a run of ``train/vq.py``."""
    config, summary = read(run, "config.json"), read(run, "summary.json")
    perceptual = {name: value for name, value in summary.items() if name.startswith(("perceptual", "LPIPS"))}
    numbers = {name: summary[name] for name in QUALITY} | perceptual
    codes = VQGAN.from_pretrained(run).quantize.num_codes
    return {"seed": config["run"]["seed"], "quantizer": summary["quantizer"], "codes": codes} | numbers


def main_job(runs: dict[str, list[Path]]) -> dict[str, Any]:
    """Runs of each quantizer; they must differ in seed and quantizer alone."""
    found: dict[str, Any] = {"command": "python train/vq.py --compile --amp --quantizer NAME --seed SEED", "runs": {}}
    for name, folders in runs.items():
        found["runs"][name] = [tokenizer(folder) for folder in folders]
        if wrong := [run["quantizer"] for run in found["runs"][name] if run["quantizer"] != name]:
            raise SystemExit(f"--{name} got runs of {wrong}")
    seeds = {tuple(run["seed"] for run in entries) for entries in found["runs"].values()}
    if len(seeds) > 1:
        raise SystemExit(f"both quantizers need runs of the same seeds, in the same order, got {sorted(seeds)}")
    return found | {"seeds": list(seeds.pop())}


def numbers_of(run: Path) -> dict[str, float]:
    """Loss, agreement and time of a prior, by the names of its summary."""
    summary = read(run, "summary.json")
    kept = {name: value for name, value in summary.items() if name.startswith(("loss", "minutes")) or " of " in name}
    images = summary["images"]
    return kept | {"images of the loss": images, "images of the agreement": min(images, prior_training.CLASSIFIED)}


@torch.no_grad()
def captions_heard(run: Path) -> dict[str, Any]:
    """Cross-entropy of masked tokens, the others being true, under true, other images', and no captions."""
    prior = VQDiffusion.from_pretrained(run).eval()
    cache = Path(read(run, "config.json")["tokens"]["cache"])
    dataset = TokenDataset(cache, "val")
    batch = dataset.__getitems__(range(min(MASKED_IMAGES, len(dataset))))
    tokens = batch["tokens"].flatten(1)
    text = prior.tokenize_text(batch["caption"])
    gamma = prior.transition.cumulative(torch.arange(prior.num_steps + 1))[2]
    order = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(0)).argsort(1).argsort(1)
    found: dict[str, Any] = {"images": len(tokens), "share masked": list(SHARES)}
    for name, condition in (("true captions", text), ("shuffled captions", text.roll(1, 0)), ("no caption", None)):
        found[name] = []
        for share in SHARES:
            masked = order < round(share * tokens.shape[1])
            step = int((gamma - share).abs().argmin())  # the step that masks about as many
            t = torch.full((len(tokens),), max(1, step))
            logits = prior(tokens.masked_fill(masked, prior.num_codes), t, condition)
            found[name].append(round(F.cross_entropy(logits[masked], tokens[masked]).item(), 4))
    return found


def other_captions(vq: Path) -> dict[str, float]:
    """What is found of captions in scenes of other captions: the level of chance."""
    size = VQGAN.from_pretrained(vq).image_size
    classifier = RegionClassifier.fit(ScenesDataset("train", size), prior_training.FITTED_TO, len(CLASSES))
    scenes = ScenesDataset("val", size, OTHER_CAPTIONS)
    batch = collate([scenes[k] for k in range(len(scenes))])
    captions = [*batch["caption"][1:], batch["caption"][0]]
    found = caption_accuracy(classifier, batch["image"], captions)
    return {
        "layout of the scenes of other captions": found.layout,
        "classes of the scenes of other captions": found.classes,
    }


def priors(vq: Path, ar: Path, diffusion: Path) -> dict[str, Any]:
    """Both priors of one tokenizer."""
    return {
        "tokenizer": tokenizer(vq),
        "ar": numbers_of(ar) | {"agreement by chance": 1 / len(CLASSES)},
        "diffusion": numbers_of(diffusion)
        | other_captions(vq)
        | {"cross-entropy of masked tokens (nats)": captions_heard(diffusion)},
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    job = kinds.add_parser("main-job", help="runs of train/vq.py, several seeds of two quantizers")
    for name in ("reg-vq", "vq-gan"):
        job.add_argument(f"--{name}", type=Path, nargs="+", required=True, metavar="RUN")
    both = kinds.add_parser("priors", help="a run of train/ar.py and one of train/diffusion.py, and their tokenizer")
    for name in ("vq", "ar", "diffusion"):
        both.add_argument(f"--{name}", type=Path, required=True, metavar="RUN")
    for each in (job, both):
        each.add_argument("--json", type=records.path_to_write, required=True, metavar="FILE", help="file to write")
    return parser.parse_args()


def main() -> None:
    given = parse()
    where = {"machine": machine.describe_cpu() | machine.describe_software(), "date": str(datetime.date.today())}
    if given.kind == "main-job":
        found = main_job({"reg-vq": given.reg_vq, "vq-gan": given.vq_gan})
    else:
        found = priors(given.vq, given.ar, given.diffusion)
    records.save(given.json, where | found)


if __name__ == "__main__":
    main()
