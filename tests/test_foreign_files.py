"""The smallest files of each kind that fuzzing (tests/fuzz.py) found to crash a reader, hang it or be misread."""

import errno
import json
import tarfile
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import fuzz_readers as valid
from helpers.archive_trees import celebahq, coco, cub200
from helpers.hostile_images import encoded, gradient
from PIL import Image
from safetensors.torch import load_file, save_file

from regvq_fast.config import VQGAN_PRESETS, VQGANConfig, parse_config, read_config
from regvq_fast.data.archives import ArchiveDataset, find_archive
from regvq_fast.data.encoded_images import EncodedImages
from regvq_fast.data.image_arrays import ImageArray
from regvq_fast.data.manifest import read_manifest
from regvq_fast.data.reading import is_of_the_machine
from regvq_fast.data.shard_index import ENTRY, INDEX_NAME, load_indexes, read_index
from regvq_fast.data.token_cache import open_shard, read_info, shard_path
from regvq_fast.data.tokens import TokenDataset
from regvq_fast.data.transforms import Box, crop_labels
from regvq_fast.models import VQGAN

DEEP = "[" * 100_000


def open_archive(folder: Path) -> ArchiveDataset:
    archive = find_archive(folder)
    assert archive is not None
    return ArchiveDataset(archive, "train", 8, fields=archive.fields)


@pytest.mark.parametrize(
    ("make", "name", "read"),
    [
        (valid._make_cache, "cache.json", read_info),
        (valid._make_shards, "shards/regvq-data.json", lambda folder: read_manifest(folder / "shards")),
        (valid._make_config, "config.json", lambda folder: read_config(folder, VQGANConfig)),
        (valid._make_model, "model/manifest.json", valid._read_model),
        (valid._make_model_alone, "model/config.json", valid._read_model),
        (coco, "annotations/captions_train2017.json", open_archive),
    ],
)
def test_deeply_nested_json_is_damage(tmp_path: Path, make: Any, name: str, read: Callable[[Path], object]) -> None:
    make(tmp_path)
    read(tmp_path)
    (tmp_path / name).write_text(DEEP)
    with pytest.raises(ValueError, match=Path(name).name):
        read(tmp_path)


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_bytes()) | values))


@pytest.mark.parametrize(
    "values",
    [
        {"num_codes": "many"},
        {"num_codes": 0},
        {"shard_samples": 0},
        {"shard_samples": [4]},
        {"token_shape": [2.5, 3]},
        {"token_shape": [2, 0]},
        {"views": 2**64},
        {"num_classes": "x"},
        {"num_classes": 0},
        {"fields": "caption"},
        {"label_names": [1, 2, 3]},
        {"complete": 1},
    ],
)
def test_a_cache_with_a_setting_of_another_kind_is_refused(tmp_path: Path, values: dict[str, object]) -> None:
    valid._make_cache(tmp_path)
    change(tmp_path / "cache.json", **values)
    with pytest.raises(ValueError, match=r"cache\.json is damaged.*" + next(iter(values))):
        TokenDataset(tmp_path)


def test_captions_of_a_cache_have_to_be_utf_8_and_end_where_it_says(tmp_path: Path) -> None:
    valid._make_cache(tmp_path)
    path = shard_path(tmp_path, "val", 0)
    whole = path.read_bytes()
    path.write_bytes(whole.replace("é".encode(), b"\xff\xff"))
    with pytest.raises(ValueError, match=f"{tmp_path} holds a caption that is not UTF-8"):
        TokenDataset(tmp_path, "val")[0]
    info, ends = read_info(tmp_path), (12, 24, 36)
    for wrong in ((12, 24, 35), (12, -(2**63), 36)):  # one byte is lost; a difference overflows
        path.write_bytes(whole.replace(np.int64(ends).tobytes(), np.int64(wrong).tobytes()))
        with pytest.raises(ValueError, match=r"val-000000.*caption"):
            open_shard(tmp_path, info, "val", 0)


def test_offsets_of_a_shard_are_whole_numbers(tmp_path: Path) -> None:
    valid._make_cache(tmp_path)
    path = shard_path(tmp_path, "val", 0)
    whole = path.read_bytes()
    content = whole.replace(b":[0,", b":[0.0,")
    length = int.from_bytes(whole[:8], "little") + len(content) - len(whole)
    path.write_bytes(length.to_bytes(8, "little") + content[8:])
    with pytest.raises(ValueError, match="its header is damaged"):
        TokenDataset(tmp_path, "val")


@pytest.mark.parametrize(
    "values",
    [{"label_names": 1.5}, {"label_names": [None]}, {"classes": 7}, {"mirror_pairs": [[1, 256]]}, {"size": "x"}],
)
def test_a_manifest_of_shards_with_a_value_of_another_kind_is_refused(tmp_path: Path, values: dict[str, Any]) -> None:
    valid._make_shards(tmp_path)
    change(tmp_path / "shards" / "regvq-data.json", **values)
    with pytest.raises(ValueError, match=r"regvq-data\.json is damaged.*" + next(iter(values))):
        valid._read_shards(tmp_path)


@pytest.mark.parametrize(("section", "name", "value"), [("optimizer", "steps", "x"), ("model", "ch_mult", [1, 2.5])])
def test_a_configuration_with_a_value_of_another_kind_is_refused(
    tmp_path: Path, section: str, name: str, value: object
) -> None:
    valid._make_config(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_bytes())
    values[section][name] = value
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=rf"config\.json.*{name}"):
        read_config(tmp_path, VQGANConfig)


@pytest.mark.parametrize("flags", [["--config"], ["--resume", "--out"]])
def test_a_configuration_out_of_range_is_refused_by_its_folder(tmp_path: Path, flags: list[str]) -> None:
    valid._make_config(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_bytes())
    values["loss"]["r1_every"] = -1
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=rf"{tmp_path} is not valid: --r1-every .*-1$"):
        parse_config(VQGAN_PRESETS, [*flags, str(tmp_path)])


def test_headers_without_end_are_damage(tmp_path: Path) -> None:
    (tmp_path / "chain.tar").write_bytes(tarfile_header("x", tarfile.GNUTYPE_LONGNAME) * 5000)
    (tmp_path / "name.tar").write_bytes(tarfile_header("x", tarfile.XHDTYPE, 2**50) + bytes(1024))
    for name in ("chain.tar", "name.tar"):
        assert "no whole tar file" in read_index(tmp_path / name).damage


def tarfile_header(name: str, kind: bytes, size: int = 0) -> bytes:
    member = tarfile.TarInfo(name)
    member.type, member.size = kind, size
    return member.tobuf(tarfile.GNU_FORMAT)


def test_sparse_members_are_left_out(tmp_path: Path) -> None:
    """Their bytes in the tar file are not those of the file."""
    shard = tmp_path / "a.tar"
    image = encoded(gradient())
    with tarfile.open(shard, "w") as archive:
        member = tarfile.TarInfo("whole.png")
        member.size = len(image)
        archive.addfile(member, BytesIO(image))
        member = tarfile.TarInfo("sparse.png")
        member.size, member.pax_headers = 4, {"GNU.sparse.map": "100,4", "GNU.sparse.size": str(2**40)}
        archive.addfile(member, BytesIO(b"1234"))
    index = read_index(shard)
    assert len(index.entries) == 1
    assert index.left_out == {"sparse file": 1}
    assert not index.damage


@pytest.mark.parametrize("wrong", ["offset", "type"])
def test_an_index_that_does_not_fit_its_shard_is_made_anew(tmp_path: Path, wrong: str) -> None:
    valid._make_indexed(tmp_path)
    shards = sorted((tmp_path / "shards").glob("*.tar"))
    expected = load_indexes(shards)
    file = tmp_path / "shards" / INDEX_NAME
    with np.load(file) as found:
        arrays = dict(found)
    if wrong == "offset":
        arrays["entries"]["image"]["offset"] = -512
    else:
        arrays["entries"] = arrays["entries"]["hash"]
    np.savez(file, **arrays)
    for index, right in zip(load_indexes(shards), expected, strict=True):
        assert index.entries.dtype == ENTRY
        assert np.array_equal(index.entries, right.entries)


@pytest.mark.parametrize(
    ("make", "name", "content"),
    [
        (cub200, "images.txt", b"1 \xff.jpg\n"),
        (celebahq, "CelebA-HQ-to-CelebA-mapping.txt", b"idx orig_idx\n0 " + b"9" * 5000 + b"\n"),
    ],
)
def test_a_damaged_list_is_named(tmp_path: Path, make: Callable[[Path], Path], name: str, content: bytes) -> None:
    (make(tmp_path) / name).write_bytes(content)
    with pytest.raises(ValueError, match=name):
        open_archive(tmp_path)


def test_a_line_of_separators_is_empty(tmp_path: Path) -> None:
    """bytes.strip keeps them, str.split leaves nothing."""
    path = cub200(tmp_path) / "train_test_split.txt"
    path.write_bytes(path.read_bytes() + b"\x1c\n")
    assert len(open_archive(tmp_path)) == 4


def test_damaged_images_of_an_npz_file_are_named(tmp_path: Path) -> None:
    valid._make_arrays(tmp_path)
    path = tmp_path / "packed.npz"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"packed\.npz"):
        ImageArray(path)
    path.write_bytes(bytes(content[40:]))  # offsets in the file become negative
    with pytest.raises(ValueError, match=r"packed\.npz"):
        ImageArray(path)


def test_npz_bombs_are_refused_before_they_are_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "bomb.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("arr_0.npy", "w") as file:
        for _ in range(257):
            file.write(bytes(2**20))
    for read in (ImageArray, EncodedImages.load):
        with pytest.raises(ValueError, match=r"bomb\.npz.*unpack"):
            read(path)


def test_tokens_of_images_of_another_type_are_refused(tmp_path: Path) -> None:
    valid._make_encoded(tmp_path)
    path = tmp_path / "tokens.npz"
    with np.load(path) as found:
        arrays = dict(found)
    names = [{"names": np.array(["a", ""])}, {"names": np.arange(2)}, {"tokens": arrays["tokens"] + 0.5}]
    for wrong in [{"downsampling_factor": np.array(0)}, {"downsampling_factor": np.array(np.inf)}, *names]:
        np.savez(path, **(arrays | wrong))
        with pytest.raises(ValueError, match=r"tokens\.npz is damaged"):
            EncodedImages.load(path)


@pytest.mark.parametrize(
    "values",
    [
        {"ch": 200_000},
        {"num_res_blocks": 10**9},
        {"ch_mult": []},
        {"quantizer": {"type": "NearestQuantizer", "num_codes": 2**40, "code_dim": 4}},
    ],
)
def test_an_architecture_that_its_weights_do_not_have_is_refused(tmp_path: Path, values: dict[str, Any]) -> None:
    valid._make_model_alone(tmp_path)
    path = tmp_path / "model" / "config.json"
    content = json.loads(path.read_bytes())
    content["architecture"] |= values
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"{tmp_path}"):
        VQGAN.from_pretrained(path.parent)


def test_weights_of_whole_numbers_are_refused(tmp_path: Path) -> None:
    valid._make_model_alone(tmp_path)
    path = tmp_path / "model" / "model.safetensors"
    weights = load_file(path)
    save_file(weights | {"quant_conv.bias": weights["quant_conv.bias"].view(torch.int32)}, path)
    with pytest.raises(ValueError, match=r"quant_conv\.bias as torch\.int32"):
        VQGAN.from_pretrained(path.parent)


@pytest.mark.parametrize(
    "text",
    [
        "a: &a {b: *a}",
        "\n".join(
            ["a0: &a0 {x: 1}", *(f"a{k}: &a{k} {{p: *a{k - 1}, q: *a{k - 1}, r: *a{k - 1}}}" for k in range(1, 40))]
        ),
        DEEP,
        json.dumps({"ddconfig": {"resolution": float("inf"), "attn_resolutions": []}}).replace("Infinity", ".inf"),
    ],
    ids=["circle", "bomb", "deep", "infinite"],
)
def test_a_yaml_that_is_none_of_tamings_is_refused(tmp_path: Path, text: str) -> None:
    pytest.importorskip("yaml")
    valid._make_taming(tmp_path)
    (tmp_path / "last.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"last\.yaml"):
        valid._read_taming(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {3: torch.zeros(1)},
        {"encoder.conv_in.weight": torch.zeros(0, 3, 3, 3)},
        {"quantize.embedding.weight": torch.zeros(1, dtype=torch.float16).expand(2**40, 4)},
    ],
    ids=["name", "no channel", "larger than the file"],
)
def test_a_checkpoint_with_a_tensor_of_no_vqgan_is_refused(tmp_path: Path, changes: dict[Any, torch.Tensor]) -> None:
    valid._make_taming(tmp_path)
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": torch.load(path)["state_dict"] | changes}, path)
    with pytest.raises(ValueError, match=r"last\.ckpt"):
        valid._read_taming(tmp_path)


def test_class_ids_beyond_8_bits_are_refused_of_any_number_of_classes() -> None:
    ids = Image.fromarray(np.full((4, 4), 256, dtype=np.uint16))
    with pytest.raises(ValueError, match=r"0\.\.255, got 256"):
        crop_labels(ids, Box(0, 0, 4, 4), (4, 4), 2, 2, num_classes=300)


def test_a_damaged_offset_is_no_failure_of_the_storage() -> None:
    assert not is_of_the_machine(OSError(errno.EINVAL, "Invalid argument"))
    assert is_of_the_machine(OSError(errno.EIO, "Input/output error"))
