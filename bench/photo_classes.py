"""Classify the photographs' crops, their reconstructions and samples by class: the table of docs/photos.md.

    python bench/photo_classes.py --data photos --run runs/vq samples/ar samples/diffusion

The classifier of colours and textures (`regvq_fast.scenes.RegionClassifier`) takes each image as one region. It is
fitted to 1,000 training crops and their reconstructions. Samples are those of ``regvq sample --per-class``.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from regvq_fast.data.datasets import build_dataset
from regvq_fast.data.loading import read_samples
from regvq_fast.data.samples import Sample, Split
from regvq_fast.data.transforms import to_float, to_uint8
from regvq_fast.evaluation.metrics import open_samples
from regvq_fast.models.vqgan import VQGAN
from regvq_fast.scenes import RegionClassifier, region_accuracy

FITTED_TO = 1000


class Labelled(Dataset[Sample]):
    """Crops in a fixed random order, each a region of its label."""

    def __init__(self, data: Path, split: Split, image_size: int) -> None:
        self.images = build_dataset(
            data, split=split, image_size=image_size, crop="center", flip=False, fields=["label"]
        )
        self.names = self.images.label_names
        self.order = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(0)).tolist()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        sample = self.images[self.order[index]]
        return {**sample, "segmentation": region(sample["label"], sample["image"].shape[1])}


def region(label: int, size: int) -> Tensor:
    """A semantic map (size, size) of one class."""
    return torch.full((size, size), label, dtype=torch.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of regvq data photos")
    parser.add_argument("--run", type=Path, required=True, help="tokenizer")
    parser.add_argument("samples", type=Path, nargs="*", help="folders of regvq sample --per-class")
    options = parser.parse_args()
    model = VQGAN.from_pretrained(options.run)
    size = model.image_size
    training, validation = Labelled(options.data, "train", size), Labelled(options.data, "val", size)

    @torch.no_grad()
    def reconstruct(images: Tensor) -> Tensor:
        return torch.cat([to_uint8(model(to_float(part)).reconstruction) for part in images.split(32)])

    classifier = RegionClassifier.fit(training, FITTED_TO, len(training.names), reconstruct)
    crops = read_samples(validation, range(len(validation)))
    rows = {
        "validation crops": (crops["image"], crops["segmentation"]),
        "their reconstructions": (reconstruct(crops["image"]), crops["segmentation"]),
    }
    for folder in options.samples:
        samples = open_samples(folder, size)
        images = read_samples(samples, range(len(samples)))["image"]
        rows[str(folder)] = images, torch.stack([region(k % len(training.names), size) for k in range(len(images))])
    print(f"| images | found | {' | '.join(training.names)} |\n|{'---|' * (2 + len(training.names))}")
    for title, (images, maps) in rows.items():
        found = region_accuracy(classifier, images, maps)
        cells = [
            f"{len(images)} {title}",
            f"{found.accuracy:.1%}",
            *(f"{part:.0%}" for part in found.per_class.tolist()),
        ]
        print(f"| {' | '.join(cells)} |".replace("%", " %"))


if __name__ == "__main__":
    main()
