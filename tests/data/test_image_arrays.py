"""Images in .npz files: written batch by batch, read from the disk."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from regvq_fast.data.image_arrays import ImageArray, image_array_writer
from regvq_fast.data.loading import validation_batches


def noise(count: int, size: int = 5) -> Tensor:
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def write(path: Path, images: Tensor, batch: int = 3) -> None:
    with image_array_writer(path, len(images), (images.shape[2], images.shape[3])) as save:
        for part in images.split(batch):
            save(part)


def test_numpy_reads_what_is_written(tmp_path: Path) -> None:
    images = noise(7)[..., :4]  # higher than wide
    write(tmp_path / "new" / "x.npz", images)
    with np.load(tmp_path / "new" / "x.npz") as arrays:
        assert list(arrays) == ["arr_0"]
        assert np.array_equal(arrays["arr_0"], images.permute(0, 2, 3, 1).numpy())
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["x.npz"]


def test_a_file_is_whole_or_not_there(tmp_path: Path) -> None:
    def stopped() -> None:
        with image_array_writer(tmp_path / "x.npz", 4, (5, 5)) as save:
            save(noise(3))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    with pytest.raises(ValueError, match=r"3 images .*\b4$"), image_array_writer(tmp_path / "x.npz", 4, (5, 5)) as save:
        save(noise(3))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_files_of_numpy_are_read(tmp_path: Path, save) -> None:
    images = noise(7)
    array = images.permute(0, 2, 3, 1).numpy()
    save(tmp_path / "x.npz", array, np.arange(7), mu=np.zeros(3))  # labels and statistics beside them
    found = ImageArray(tmp_path / "x.npz")
    assert isinstance(found.images, np.memmap) == (save is np.savez)
    assert found.image_size == (5, 5)
    batches = list(validation_batches(found, 4, workers=1))
    assert torch.equal(torch.cat([batch["image"] for batch in batches]), images)
    save(tmp_path / "columns.npz", arr_0=np.asfortranarray(array))
    assert torch.equal(ImageArray(tmp_path / "columns.npz")[6]["image"], images[6])


def test_a_worker_gets_a_name_and_no_images(tmp_path: Path) -> None:
    write(tmp_path / "x.npz", noise(50, size=20))
    pickled = pickle.dumps(ImageArray(tmp_path / "x.npz"))
    assert len(pickled) < 1000
    assert torch.equal(pickle.loads(pickled)[49]["image"], noise(50, size=20)[49])


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"x\.npz"):
        ImageArray(tmp_path / "x.npz")
    write(tmp_path / "whole.npz", noise(2))
    for content in (b"", b"text", (tmp_path / "whole.npz").read_bytes()[:-30]):
        (tmp_path / "x.npz").write_bytes(content)
        with pytest.raises(ValueError, match=r"x\.npz .*truncated"):
            ImageArray(tmp_path / "x.npz")
    for arrays, said in (
        ({"mu": np.zeros(2)}, "has mu, but no images in arr_0"),
        ({"arr_0": np.zeros((2, 3, 5, 5), np.uint8)}, r"\(2, 3, 5, 5\) uint8"),
        ({"arr_0": np.zeros((2, 5, 5, 3), np.float32)}, "float32"),
        ({"arr_0": np.zeros((0, 5, 5, 3), np.uint8)}, r"\(0, 5, 5, 3\)"),
    ):
        np.savez(tmp_path / "x.npz", **arrays)
        with pytest.raises(ValueError, match=said):
            ImageArray(tmp_path / "x.npz")
    np.save(tmp_path / "x.npy", np.zeros(2))
    with pytest.raises(ValueError, match="one array"):
        ImageArray(tmp_path / "x.npy")
