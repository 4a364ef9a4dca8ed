"""Small valid files of every reader, and what reading them may give."""

import dataclasses
import json
import shutil
import tarfile
from collections.abc import Callable, Iterable
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from helpers.archive_trees import ade20k, celebahq, coco, cub200, imagenet
from helpers.hostile_images import encoded, gradient
from helpers.tiny_models import tiny_vqgan
from PIL import Image

from regvq_fast.config import VQGANConfig
from regvq_fast.config.command_line import read_checked
from regvq_fast.data.archives import ArchiveDataset, find_archive
from regvq_fast.data.encoded_images import EncodedImages
from regvq_fast.data.folder import ImageFolder
from regvq_fast.data.image_arrays import ImageArray
from regvq_fast.data.manifest import Manifest, write_manifest
from regvq_fast.data.shard_index import INDEX_NAME
from regvq_fast.data.shards import ImageShards, write_shards
from regvq_fast.data.token_cache import CacheInfo, shard_path, write_info, write_shard
from regvq_fast.data.tokens import TokenDataset
from regvq_fast.models import VQGAN
from regvq_fast.quantizers import NearestQuantizer
from regvq_fast.training.checkpoint import Checkpoints, find_checkpoint

SIDE = 8


class Reader(NamedTuple):
    """A reader of foreign files."""

    make: Callable[[Path], object]
    """Writes valid files into a folder."""
    read: Callable[[Path], object]
    """Reads them, and asserts that values are of their types and ranges."""
    after: Callable[[Path], object] = lambda folder: None
    """Removes what an earlier reading wrote."""
    writes: bool = False
    """True if reading changes the files themselves."""


def _check(samples: Iterable[Any], fields: str, classes: int | None, labels: int) -> None:
    for sample in samples:
        assert sample.keys() == {"image", *fields.split()}
        assert sample["image"].shape == (3, SIDE, SIDE)
        assert sample["image"].dtype == torch.uint8
        if "segmentation" in sample:
            assert sample["segmentation"].shape == (SIDE, SIDE)
            assert sample["segmentation"].dtype == torch.uint8
            assert classes is None or sample["segmentation"].max() < classes
        if "caption" in sample:
            assert sample["caption"] == sample["caption"].strip() != ""
            sample["caption"].encode()
        if "label" in sample:
            assert 0 <= sample["label"] < labels


def _read_images(kind: Any, source: Any, fields: str) -> None:
    for split in ("train", "val"):
        data = kind(source, split, SIDE, fields=fields.split())
        _check((data[k] for k in range(min(len(data), 12))), fields, data.num_classes, len(data.label_names))


def _samples(suffix: str, kind: str, turned: bool = False) -> dict[str, bytes]:
    image = gradient(24, 20)
    label_map = Image.fromarray((np.arange(480) % 7).astype(np.uint8).reshape((24, 20) if turned else (20, 24)))
    return {suffix: encoded(image, kind), "txt": b"one\ntwo \xc3\xa9\n", "seg.png": encoded(label_map)}


_KINDS = {"jpg": "JPEG", "png": "PNG", "gif": "GIF", "tif": "TIFF", "webp": "WEBP", "bmp": "BMP"}


def _make_folder(folder: Path) -> None:
    for number, (suffix, kind) in enumerate(_KINDS.items()):
        for name, data in _samples(suffix, kind).items():
            path = folder / f"photos/{'ab'[number % 2]}/{number}.{name}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    exif = Image.Exif()
    exif[0x0112] = 6
    wide = Image.fromarray(np.arange(480, dtype=np.uint16).reshape(20, 24) * 100)
    tall = {"turned.jpg": encoded(gradient(24, 20), "JPEG", exif=exif), "wide.tiff": encoded(wide, "TIFF")}
    tall["packed.tif"] = encoded(gradient(24, 20), "TIFF", compression="tiff_lzw")
    tall["deflated.tif"] = encoded(gradient(24, 20), "TIFF", compression="tiff_adobe_deflate")
    for name, data in tall.items():
        (folder / "photos" / "a" / name).write_bytes(data)
        for suffix, other in list(_samples("jpg", "JPEG", turned=name == "turned.jpg").items())[1:]:
            (folder / "photos" / "a" / f"{name.partition('.')[0]}.{suffix}").write_bytes(other)


def _make_shards(folder: Path) -> None:
    samples = [
        {"__key__": f"{'ab'[k % 2]}/{k}", **_samples(suffix, kind), "cls": str(k % 3)}
        for k, (suffix, kind) in enumerate(_KINDS.items())
    ]
    write_shards(samples[:4], str(folder / "shards" / "0-%d.tar"))
    with tarfile.open(folder / "shards" / "1.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        for sample in samples[4:]:
            for name, data in list(sample.items())[1:]:
                member = tarfile.TarInfo(f"{'long' * 40}/é-{sample['__key__']}.{name}")
                data = data if isinstance(data, bytes) else data.encode()
                member.size = len(data)
                archive.addfile(member, BytesIO(data))
    splits = {"train": {}, "val": {}}
    names = ("x", "y", "z")
    classes = [f"class {k}" for k in range(7)]
    manifest = Manifest("ade20k", "Title", "there", 20, 95, splits, classes, names, ((1, 2), (3, 4)))
    write_manifest(folder / "shards", manifest)


def _read_shards(folder: Path) -> None:
    _read_images(ImageShards, folder / "shards", "caption segmentation label")


def _drop_index(folder: Path) -> None:
    (folder / "shards" / INDEX_NAME).unlink(missing_ok=True)


def _make_indexed(folder: Path) -> None:
    _make_shards(folder)
    _read_shards(folder)


def _archive(make: Callable[..., Path], fields: str, *options: Any) -> Reader:
    def read(folder: Path) -> None:
        shutil.rmtree(folder / "cache", ignore_errors=True)
        archive = find_archive(folder / "data")
        if archive is None:
            raise ValueError(f"{folder} is no archive")
        _read_images(ArchiveDataset, archive, fields)

    def without_maps(folder: Path) -> None:
        for found in folder.rglob(".regvq-maps"):
            shutil.rmtree(found)

    return Reader(lambda folder: make(folder / "data", *options), read, without_maps)


def _imagenet_mat(folder: Path) -> None:
    from scipy.io import savemat

    imagenet(folder, False, "ILSVRC2012_validation_ground_truth.txt")
    (folder / "map_clsloc.txt").unlink()
    numbers = [(k, s) for k, s in enumerate(("n02119789", "n01440764", "n03995372"), start=1)]
    rows = np.array(numbers, dtype=[("ILSVRC2012_ID", object), ("WNID", object)])
    savemat(folder / "meta.mat", {"synsets": rows}, do_compression=True)


_INFO = CacheInfo(
    "runs/tiny", "5eed", 1000, (2, 3), 16, "fp32", "photos", 7, "center", False, 2, 5, 3,
    ("caption", "label", "segmentation"), 4, 7, ("a", "b", "c"), True,
)  # fmt: skip


def _make_cache(folder: Path) -> None:
    for split in ("train", "val"):
        for number in range(_INFO.num_shards(split)):
            numbers = np.array(_INFO.shard_range(split, number))
            grid = np.ones((len(numbers), 2, 3), dtype=np.int64) * numbers[:, None, None]
            captions = [f"caption {g} é" for g in numbers]
            labels = (numbers % 3).astype(np.int32)
            maps = (grid % 7).astype(np.uint8)
            write_shard(shard_path(folder, split, number), grid.astype(np.uint16), maps, captions, labels)
    write_info(folder, _INFO)


def _read_cache(folder: Path) -> None:
    for split in ("train", "val"):
        data = TokenDataset(folder, split, seed=7)
        for k in range(min(len(data), 12)):
            sample = data[k]
            assert sample.keys() >= {"tokens"}
            assert sample["tokens"].shape == tuple(data.info.token_shape)
            assert 0 <= sample["tokens"].min() <= sample["tokens"].max() < data.info.num_codes
            if "caption" in sample:
                assert sample["caption"]
            if "label" in sample:
                assert isinstance(data.info.label_names[sample["label"]], str)


def _make_encoded(folder: Path) -> None:
    tokens = [torch.arange(6).view(2, 3), torch.arange(4).view(2, 2)]
    EncodedImages(["a.png", "é/b.png"], tokens, [(4, 6), (3, 4)], "5eed", 16, 2).save(folder / "tokens.npz")


def _read_encoded(folder: Path) -> None:
    content = EncodedImages.load(folder / "tokens.npz")
    assert all(isinstance(name, str) and name for name in content.names)
    assert all(t.min() >= 0 and t.max() < content.num_codes and t.dtype == torch.int64 for t in content.tokens)


def _make_arrays(folder: Path) -> None:
    images = np.arange(5 * 4 * 3 * 3, dtype=np.uint8).reshape(5, 4, 3, 3)
    np.savez(folder / "plain.npz", images)
    np.savez_compressed(folder / "packed.npz", images)


def _read_arrays(folder: Path) -> None:
    for name in ("plain.npz", "packed.npz"):
        data = ImageArray(folder / name)
        for k in range(min(len(data), 5)):
            assert data[k]["image"].shape == (3, *data.image_size)
            assert data[k]["image"].dtype == torch.uint8


def _make_model(folder: Path) -> None:
    torch.manual_seed(0)
    tiny_vqgan().save_pretrained(folder / "model")


def _make_model_alone(folder: Path) -> None:
    """A model without a manifest, which checks no file before it is parsed."""
    _make_model(folder)
    (folder / "model" / "manifest.json").unlink()


def _read_model(folder: Path) -> None:
    model = VQGAN.from_pretrained(folder / "model")
    tokens = model.tokenize(torch.zeros(1, 3, 16, 16))
    assert 0 <= tokens.min() <= tokens.max() < model.quantize.num_codes


def _make_taming(folder: Path) -> None:
    sizes = {"image_size": 16, "ch": 32, "ch_mult": (1, 1), "num_res_blocks": 1, "z_channels": 4, "norm_groups": 32}
    torch.manual_seed(0)
    model = VQGAN(NearestQuantizer(4, 4), attn_resolutions=(), **sizes)
    state = {name: value.half() for name, value in model.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3, "callbacks": {"x": [1, 2.5]}}, folder / "last.ckpt")
    described = {"ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1, "z_channels": 4, "in_channels": 3}
    described |= {"resolution": 16, "attn_resolutions": [], "dropout": 0.0}
    (folder / "last.yaml").write_text(json.dumps({"model": {"params": {"ddconfig": described}}}))


def _read_taming(folder: Path) -> None:
    model = VQGAN.from_taming(folder / "last.ckpt", config=folder / "last.yaml")
    assert model.image_size >= 2


def _config(folder: Path) -> VQGANConfig:
    config = VQGANConfig()
    return dataclasses.replace(config, run=dataclasses.replace(config.run, out=folder / "run", resume=True))


def _make_config(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(_config(folder)), default=str, indent=1))


def _read_config(folder: Path) -> None:
    read_checked(folder, VQGANConfig).check()


def _make_run(folder: Path) -> None:
    run = folder / "run"
    _make_config(run)
    description = json.loads((run / "config.json").read_bytes())
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 0.5}\n')
    checkpoints = Checkpoints(run, 2)
    state = {"identity": {}, "fingerprint": "x", "metrics_bytes": 25, "model": {}, "others": {}, "optimizers": {}}
    for step in (1, 2):
        checkpoints.save(step, description, {"w": torch.zeros(2)}, dict(state))
    checkpoints.mark_best({"perceptual": 0.1})


def _read_run(folder: Path) -> None:
    found = find_checkpoint(_config(folder))
    assert found.step in (0, 1, 2)
    assert found.step == 0 or found.weights["w"].shape == (2,)
    assert Checkpoints(folder / "run", 2, found).newest == found.folder


DATA_READERS = {
    "folder of images": Reader(
        _make_folder, lambda f: _read_images(ImageFolder, f / "photos", "caption segmentation label")
    ),
    "tar shards": Reader(_make_shards, _read_shards, _drop_index),
    "index of shards": Reader(_make_indexed, _read_shards, writes=True),
    "CUB-200": _archive(cub200, "caption label"),
    "COCO": _archive(coco, "caption segmentation"),
    "ImageNet, csv": _archive(imagenet, "label"),
    "ImageNet, mat": _archive(_imagenet_mat, "label"),
    "CelebA-HQ": _archive(celebahq, "segmentation"),
    "ADE20K": _archive(ade20k, "segmentation"),
    "token cache": Reader(_make_cache, _read_cache),
    "tokens.npz": Reader(_make_encoded, _read_encoded),
    "images.npz": Reader(_make_arrays, _read_arrays),
    "model folder": Reader(_make_model, _read_model),
    "model alone": Reader(_make_model_alone, _read_model),
    "taming": Reader(_make_taming, _read_taming),
    "config.json": Reader(_make_config, _read_config),
    "run to resume": Reader(_make_run, _read_run, writes=True),
}
