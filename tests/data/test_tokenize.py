"""Batches of images made into tokens, and maps reduced to the tokens' grid by majority vote."""

from collections import Counter

import pytest
import torch
from helpers.tiny_models import scenes_batch, tiny_tokenizer

from regvq_fast.data.tokens import majority_vote, tokenize_batch


def vote_plainly(segmentation: torch.Tensor, shape: tuple[int, int]) -> list:
    """Pixel by pixel, in the words of the docstring."""
    height, width = segmentation.shape
    cells = [[Counter() for _ in range(shape[1])] for _ in range(shape[0])]
    for y in range(height):
        for x in range(width):
            cells[int((y + 0.5) / height * shape[0])][int((x + 0.5) / width * shape[1])][int(segmentation[y, x])] += 1
    return [[min(cell, key=lambda c, cell=cell: (-cell[c], c)) for cell in row] for row in cells]


@pytest.mark.parametrize(("size", "shape"), [((8, 8), (4, 2)), ((12, 9), (3, 9)), ((7, 10), (3, 4)), ((5, 5), (1, 1))])
def test_majority_vote_is_that_of_the_pixels(size, shape) -> None:
    generator = torch.Generator().manual_seed(0)
    few = torch.randint(0, 3, (6, *size), generator=generator, dtype=torch.uint8)  # many ties
    maps = torch.cat([few, few * 127 + 1, torch.randint(0, 256, (2, *size), generator=generator, dtype=torch.uint8)])
    voted = majority_vote(maps, shape)
    assert voted.dtype == torch.uint8
    assert voted.tolist() == [vote_plainly(one, shape) for one in maps]


def test_the_smallest_id_wins_a_tie() -> None:
    segmentation = torch.tensor([[[9, 255], [255, 9]]], dtype=torch.uint8)
    assert majority_vote(segmentation, (1, 1)).item() == 9
    assert torch.equal(majority_vote(segmentation, (2, 2)), segmentation)


def test_majority_vote_refuses_what_is_no_map() -> None:
    maps = torch.zeros(1, 4, 4, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"4 x 4 .*5 x 4"):
        majority_vote(maps, (5, 4))
    with pytest.raises(ValueError, match=r"\(B, H, W\).*\(4, 4\)"):
        majority_vote(maps[0], (2, 2))
    with pytest.raises(TypeError, match=r"uint8.* torch\.int64"):
        majority_vote(maps.long(), (2, 2))


def test_tokenizing_keeps_what_images_come_with() -> None:
    model, images = tiny_tokenizer(), scenes_batch(5)
    batch = tokenize_batch(model, images)
    assert batch["tokens"].shape == (5, 8, 8)
    assert batch["tokens"].dtype == torch.int64
    assert len(batch["tokens"].unique()) > 4
    assert torch.equal(batch["tokens"], model.tokenize(images["image"] / 127.5 - 1))
    assert torch.equal(batch["segmentation"], majority_vote(images["segmentation"], (8, 8)))
    assert batch["caption"] == images["caption"]
    assert tokenize_batch(model, {"image": images["image"]}).keys() == {"tokens"}
