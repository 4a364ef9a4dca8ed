"""What finished runs on the embedded scenes reached, as the results that the pages' tables are made of.

    python bench/trained_runs.py main-job --reg-vq runs/a runs/b runs/c --vq-gan runs/d runs/e runs/f --json FILE
    python bench/trained_runs.py priors --vq runs/vq --ar runs/ar --diffusion runs/diffusion --json FILE
    python bench/trained_runs.py noise --runs runs/n256 runs/n1024 --fid-features vgg16:PATH --json FILE

The pages have bench/results/cpu-main-job.json, cpu-priors.json and cpu-noise.json. Numbers are those of the runs'
summaries and records. Measured here are, of a diffusion prior, what its captions tell it, and of tokenizers, what
reconstructions lose where every code is sampled. Run it on the checkout that trained them.
"""

import argparse
import datetime
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import machine
import records
import torch
import torch.nn.functional as F

from regvq_fast.data import TokenDataset
from regvq_fast.data.loading import collate
from regvq_fast.data.transforms import to_float, to_uint8
from regvq_fast.evaluation.feature_nets import load_feature_net
from regvq_fast.evaluation.fid import FeatureStatistics, frechet_distance
from regvq_fast.models import VQGAN
from regvq_fast.priors.diffusion import VQDiffusion
from regvq_fast.quantizers import RegularizedQuantizer
from regvq_fast.scenes import CLASSES, RegionClassifier, ScenesDataset, caption_accuracy, evaluation

SHARES = (1.0, 0.75, 0.5, 0.25)  # of tokens that are masked
MASKED_IMAGES = 256
SAMPLED_IMAGES = 1024
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
    return kept | {"images of the loss": images, "images of the agreement": min(images, evaluation.CLASSIFIED)}


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
    classifier = RegionClassifier.fit(ScenesDataset("train", size), evaluation.FITTED_TO, len(CLASSES))
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


def records_of(run: Path) -> list[dict[str, Any]]:
    """The softmax of a run's logits: its first, middle and last record of training."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    found = [record for record in map(json.loads, lines) if record["split"] == "train"]
    names = ("step", "entropy", "largest_p", "perturbed", "logit_scale")
    return [{name: record[name] for name in names} for record in (found[0], found[len(found) // 2], found[-1])]


@torch.no_grad()
def sampled(run: Path, features: str) -> dict[str, Any]:
    """Reconstructions of the best codes beside those of codes that are sampled at every position."""
    model, net = VQGAN.from_pretrained(run).eval(), load_feature_net(features)
    quantizer = cast(RegularizedQuantizer, model.quantize)
    scenes = ScenesDataset("val", model.image_size, SAMPLED_IMAGES)
    originals, kinds = FeatureStatistics.zeros(net.num_features), ("best", "sampled")
    statistics = {kind: FeatureStatistics.zeros(net.num_features) for kind in kinds}
    psnr: dict[str, list[float]] = {kind: [] for kind in kinds}
    moved, distance = [], []
    quantizer.settings, scale = replace(quantizer.settings, mask_ratio=1.0), quantizer.log_scale.clone()
    for first in range(0, SAMPLED_IMAGES, 64):
        batch = collate([scenes[k] for k in range(first, first + 64)])["image"]
        originals.add(net(batch))
        z = model.encode(to_float(batch))
        outputs = {
            "best": quantizer.eval()(z),
            "sampled": quantizer.train()(z, torch.tensor(0), first * z[0, 0].numel()),
        }
        quantizer.log_scale.copy_(scale)  # training would move it
        for kind, output in outputs.items():
            images = to_uint8(model.eval().decode(output.quantized))
            statistics[kind].add(net(images))
            error = (images.float() - batch.float()).square().mean((1, 2, 3)) / 255**2
            psnr[kind] += (-10 * error.log10()).tolist()
        moved.append((outputs["best"].indices != outputs["sampled"].indices).float().mean())
        distance.append(outputs["sampled"].perturbation.mean())
    codes = quantizer.codes()
    between = 2 * (codes - codes.mean(0)).square().sum(1).mean()  # two random codes, squared
    return {
        **{f"PSNR of {kind} codes": sum(psnr[kind]) / SAMPLED_IMAGES for kind in kinds},
        **{f"Frechet distance of {kind} codes": frechet_distance(originals, statistics[kind]) for kind in kinds},
        "tokens moved": float(torch.stack(moved).mean()),
        "squared distance moved, over that of two random codes": float(torch.stack(distance).mean() / between),
        "features": net.name,
        "images": SAMPLED_IMAGES,
    }


def noise(runs: list[Path], features: str) -> dict[str, Any]:
    """Softmax during training and sampled reconstructions of reg-vq runs of several codebook sizes."""
    found = []
    for run in runs:
        config = read(run, "config.json")
        settings = {name: config["quantizer"][name] for name in ("num_codes", "code_dim", "logits")}
        told = {
            "seed": config["run"]["seed"],
            "steps": config["optimizer"]["steps"],
            "image size": config["data"]["image_size"],
        }
        found.append(settings | told | tokenizer(run) | {"softmax": records_of(run)} | sampled(run, features))
    return {"runs": found}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    job = kinds.add_parser("main-job", help="runs of train/vq.py, several seeds of two quantizers")
    for name in ("reg-vq", "vq-gan"):
        job.add_argument(f"--{name}", type=Path, nargs="+", required=True, metavar="RUN")
    both = kinds.add_parser("priors", help="a run of train/ar.py and one of train/diffusion.py, and their tokenizer")
    for name in ("vq", "ar", "diffusion"):
        both.add_argument(f"--{name}", type=Path, required=True, metavar="RUN")
    noisy = kinds.add_parser("noise", help="runs of train/vq.py with reg-vq, of several sizes of the codebook")
    noisy.add_argument("--runs", type=Path, nargs="+", required=True, metavar="RUN")
    noisy.add_argument("--fid-features", required=True, help="as of train/evaluate.py")
    for each in (job, both, noisy):
        each.add_argument("--json", type=records.path_to_write, required=True, metavar="FILE", help="file to write")
    return parser.parse_args()


def main() -> None:
    given = parse()
    where = {"machine": machine.describe_cpu() | machine.describe_software(), "date": str(datetime.date.today())}
    if given.kind == "main-job":
        found = main_job({"reg-vq": given.reg_vq, "vq-gan": given.vq_gan})
    elif given.kind == "noise":
        found = noise(given.runs, given.fid_features)
    else:
        found = priors(given.vq, given.ar, given.diffusion)
    records.save(given.json, where | found)


if __name__ == "__main__":
    main()
