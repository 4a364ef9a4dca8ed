"""Make the README's first image: originals, and their reconstructions by a VQ-GAN and by Reg-VQ.

    python bench/first_picture.py --vq-gan RUN --reg-vq RUN --out docs/pictures/reconstructions.png

Both are finished runs of train/vq.py on the same data. The fraction of codes used is that of their summaries.
"""

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from regvq_fast.config import VQGANConfig, read_config
from regvq_fast.data.datasets import build_dataset
from regvq_fast.data.loading import collate
from regvq_fast.data.transforms import to_float, to_uint8
from regvq_fast.evaluation.plots import save_labelled_rows
from regvq_fast.models import VQGAN
from regvq_fast.number_formats import percent

IMAGES = 8


def used(run: Path) -> str:
    """The fraction of codes that a run's evaluation selected."""
    path = run / "summary.json"
    if not path.is_file():
        raise SystemExit(f"{path} does not exist; give the folder of a finished run of train/vq.py")
    return f"{percent(json.loads(path.read_bytes())['utilization'])} of codes"


@torch.no_grad()
def reconstruct(run: Path, images: Tensor) -> Tensor:
    return VQGAN.from_pretrained(run).eval()(to_float(images)).reconstruction


def first_picture(runs: dict[str, Path], out: Path) -> None:
    """Save originals and their reconstructions by each run, by its name."""
    labels = {name: f"{name}\n{used(run)}" for name, run in runs.items()}
    configs = {str(run): read_config(run, VQGANConfig) for run in runs.values()}
    data = {run: (config.data.data, config.data.image_size, config.run.seed) for run, config in configs.items()}
    if len(set(data.values())) > 1:
        raise SystemExit(f"the runs differ in data, image size or seed; give runs that agree in them: {data}")
    source, size, seed = next(iter(data.values()))
    val_set = build_dataset(source, split="val", image_size=size, length=IMAGES, seed=seed)
    originals = collate([val_set[k] for k in range(min(IMAGES, len(val_set)))])["image"]
    rows = {labels[name]: to_uint8(reconstruct(run, originals)) for name, run in runs.items()}
    save_labelled_rows(out, {"originals": originals} | rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("vq-gan", "reg-vq"):
        parser.add_argument(f"--{name}", type=Path, required=True, metavar="RUN", help=f"run of --quantizer {name}")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="image to write")
    given = parser.parse_args()
    first_picture({"VQ-GAN": given.vq_gan, "Reg-VQ": given.reg_vq}, given.out)


if __name__ == "__main__":
    main()
