"""Existing files of an official split."""

from collections.abc import Collection

from regvq_fast.data.archives.archive import Archive
from regvq_fast.data.samples import Field


class SplitFiles:
    """The images of a split, and their other fields.

    Args:
        archive: the archive.
        partition: an official split.
        fields: to look for.

    Attributes:
        names: images whose files exist, in the list's order.
        missing: images of the list whose files don't exist.
        has: for each field, a mask (len(names),) bool of the images that have it.

    Raises:
        FileNotFoundError: a list is missing. ValueError: one is damaged.
    """

    def __init__(self, archive: Archive, partition: str, fields: Collection[Field]) -> None:
        self.archive, self.partition = archive, partition
        listed = archive.listed(partition)
        present = archive.has("image", listed)
        self.names = [name for name, there in zip(listed, present, strict=True) if there]
        self.missing = [name for name, there in zip(listed, present, strict=True) if not there]
        self.has = {field: archive.has(field, self.names) for field in sorted(fields)}

    def require(self) -> None:
        """Raise FileNotFoundError if there is no image, or if no image has one of the fields."""
        archive, partition = self.archive, self.partition
        if not self.names:
            raise FileNotFoundError(
                f"the {partition!r} split of {archive.heading} has no images: get it from {archive.source('image')}"
            )
        for field, there in self.has.items():
            if not there.any():
                raise FileNotFoundError(
                    f"no image of {archive.heading} ({partition}) has its {field}: get it from {archive.source(field)}"
                )

    def missing_note(self) -> str:
        """Return a text with the number of missing images and an example; empty if none is missing."""
        if not self.missing:
            return ""
        count = len(self.missing) + len(self.names)
        label = self.archive.heading
        return f"{len(self.missing)} of the {count} {self.partition} images of {label} are missing ({self.missing[0]})"
