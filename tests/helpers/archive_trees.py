"""Tiny data sets in the layouts of the official archives, with the oddities that the real ones have."""

import json
from pathlib import Path

import numpy as np
from helpers.flat_images import write_flat
from PIL import Image

from regvq_fast.data.archives.classes import ADE20K_CODE_TO_CLASS

BIRDS = ("001.Black_footed_Albatross", "002.Café_Swallow")
ADE_CODES = {"wall": 2978, "second door": 783, "traffic light": 2836, "none of the 150": 461}


def labels(path: Path, ids: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(ids.astype(np.uint8)).save(path)


def cub200(folder: Path) -> Path:
    """Eight birds, every other one for training; a greyscale one, names in Unicode, captions in text/ beside it."""
    top = folder / "CUB_200_2011"
    names = [f"{BIRDS[k % 2]}/Vogel_Größe_{k:04d}.jpg" for k in range(8)]
    for k, name in enumerate(names):
        write_flat(top / "images" / name, 20 * k, mode="L" if k == 2 else "RGB")
        text = folder / "text" / name.replace(".jpg", ".txt")
        text.parent.mkdir(parents=True, exist_ok=True)
        lines = [f"bird {k} caption {j // 2}" for j in range(10)]  # each twice
        lines[3] = f"  bird {k}\ufffds caption 1 "
        text.write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    (top / "images.txt").write_text("".join(f"{k + 1} {name}\n" for k, name in enumerate(names)), encoding="utf-8")
    (top / "train_test_split.txt").write_text("".join(f"{k + 1} {k % 2}\n" for k in range(8)))
    return top


def celebahq(folder: Path) -> Path:
    """Six faces: four, one and one in CelebA's splits; the left eye is on the left. One has no right eye."""
    top = folder / "CelebAMask-HQ"
    rows = [5, 162770, 162771, 182637, 182638, 9]  # of CelebA: the last and the first of its splits among them
    lines = ["idx     orig_idx        orig_file"]
    for k, row in enumerate(rows):
        lines.append(f"{k}       {row}      {row + 1:06d}.jpg")
        write_flat(top / "CelebA-HQ-img" / f"{k}.jpg", 20 * k, (32, 32))
        masks = {"skin": np.ones((16, 16)), "hair": np.zeros((16, 16)), "l_eye": np.zeros((16, 16))}
        masks["hair"][:4] = 1  # over the skin
        masks["l_eye"][8:12, :8] = 1
        if k != 5:
            masks["r_eye"] = np.zeros((16, 16))
            masks["r_eye"][8:12, 8:] = 1
        for part, mask in masks.items():
            path = top / "CelebAMask-HQ-mask-anno" / "0" / f"{k:05d}_{part}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((255 * mask).astype(np.uint8)).convert("RGB").save(path)
    (top / "CelebA-HQ-to-CelebA-mapping.txt").write_text("\n".join(lines) + "\n")
    return top


def ade20k(folder: Path) -> Path:
    """The benchmark: four images for training, two for validation; one CMYK; no map for one."""
    top = folder / "ADEChallengeData2016"
    for partition, count, short in (("training", 4, "train"), ("validation", 2, "val")):
        for k in range(count):
            name = f"ADE_{short}_{k + 1:08d}"
            write_flat(top / "images" / partition / f"{name}.jpg", 40 * k, mode="CMYK" if k == 1 else "RGB")
            if (partition, k) != ("training", 3):
                labels(top / "annotations" / partition / f"{name}.png", np.full((20, 24), 150 - k))
    (top / "objectInfo150.txt").write_text("Idx\tRatio\tTrain\tVal\tName\n1\t0.1576\t11664\t1172\twall\n")
    return top


def ade20k_full(folder: Path, year: int) -> Path:
    """A full release: maps in colours beside the images, in folders of scenes; masks of instances beside (2021)."""
    top = folder / {2016: "ADE20K_2016_07_26", 2021: "ADE20K_2021_17_01"}[year]
    images = top / "images" / "ADE" if year == 2021 else top / "images"
    for partition in ("training", "validation"):
        for k, scene in enumerate(("a/abbey", "s/street")):
            path = images / partition / scene / f"ADE_{partition[:5]}_{k:08d}.jpg"
            write_flat(path, 40 * k)
            colours = np.zeros((20, 24, 3))
            for column, code in enumerate(ADE_CODES.values()):
                colours[:, 6 * column : 6 * column + 6] = (code // 256 * 10, code % 256, 17 * column)
            labels(path.with_name(f"{path.stem}_seg.png"), colours)
            labels(path.with_name(f"{path.stem}_parts_1.png"), colours)
            labels(path.parent / path.stem / f"instance_000_{path.stem}.png", np.ones((20, 24)))
    (top / {2016: "index_ade20k.mat", 2021: "index_ade20k.pkl"}[year]).write_bytes(b"never opened")
    assert ADE20K_CODE_TO_CLASS[ADE_CODES["wall"]] == 1
    return top


def coco(folder: Path, year: int = 2017, images: str = "", stuff: str | None = "stuffthingmaps/{}") -> Path:
    """Four images for training, two for validation; a greyscale one, one without captions, captions said twice."""
    top = folder
    for split, count in (("train", 4), ("val", 2)):
        prefix = f"COCO_{split}{year}_" if year == 2014 else ""
        content: dict = {"info": {}, "licenses": [], "images": [], "annotations": []}
        for k in range(count):
            number = 9 + 100 * k
            name = f"{prefix}{number:012d}.jpg"
            write_flat(top / images / f"{split}{year}" / name, 40 * k, mode="L" if k == 1 else "RGB")
            content["images"].append({"id": number, "file_name": name, "height": 20, "width": 24})
            captions = [] if (split, k) == ("train", 3) else [f"Photo {k}.", f"photo\n{k} ", f"Photo {k}.", "  "]
            for j, caption in enumerate(captions):
                content["annotations"].insert(0, {"image_id": number, "id": 10 * k + j, "caption": caption})
            if stuff:
                ids = np.array([[0, 181, 255]]).repeat(20, 0).repeat(8, 1)
                ids = np.where(ids == 255, 0, ids + 1) if "pixelmaps" in stuff else ids
                labels(top / stuff.format(f"{split}2017") / f"{number:012d}.png", ids)
        path = top / "annotations" / f"captions_{split}{year}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    return top


SYNSETS = {"n02119789": "kit fox", "n01440764": "tench, Tinca tinca", "n03995372": "power drill"}
"""In the order of the development kit."""


def imagenet(folder: Path, kaggle: bool = False, flat: str | None = "LOC_val_solution.csv") -> Path:
    """Three classes: two images each for training, one for validation, flat with a list of their classes (its name) or,
    without, in folders. Levels are 40 times the rank of the class, 10 more for the second image.
    """
    images = folder / "ILSVRC" / "Data" / "CLS-LOC" if kaggle else folder
    solution = ["ImageId,PredictionString"]
    for number, synset in enumerate(SYNSETS, start=1):
        level = 40 * sorted(SYNSETS).index(synset)
        for k in range(2):
            write_flat(images / "train" / synset / f"{synset}_{k}.JPEG", level + 10 * k)
        name = f"ILSVRC2012_val_{number:08d}"
        write_flat(images / "val" / ("" if flat else synset) / f"{name}.JPEG", level)
        solution.insert(1, f"{name},{synset} 85 1 499 272 {synset} 1 2 3 4 ")
    lines = {
        "LOC_synset_mapping.txt": [f"{synset} {name}" for synset, name in SYNSETS.items()],
        "LOC_val_solution.csv": solution,
        "ILSVRC2012_validation_ground_truth.txt": ["1", "2", "3"],
        "map_clsloc.txt": [f"{synset} {k} {name}" for k, (synset, name) in enumerate(SYNSETS.items(), start=1)],
    }
    devkit = "ILSVRC2012_validation_ground_truth.txt", "map_clsloc.txt"
    for name in ["LOC_synset_mapping.txt", *(devkit if flat in devkit else [flat] if flat else [])]:
        (folder / name).write_text("\n".join(lines[name]) + "\n")
    return folder / "ILSVRC" if kaggle else folder
