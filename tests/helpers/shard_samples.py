"""Numbered samples of shards: shared by tests of shards."""

from helpers.flat_images import encode_flat

FIELDS = ("caption", "segmentation")


def sample(k: int, folder="") -> dict[str, str | bytes]:
    """A sample whose number is its image's level, its caption and its class id."""
    return {
        "__key__": f"{folder}{k:03d}",
        "png": encode_flat(k),
        "txt": f"number {k}",
        "seg.png": encode_flat(k, mode="L"),
    }
