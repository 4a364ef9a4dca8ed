"""The paper's data sets and ImageNet in the layouts of their official archives, one module each."""

from regvq_fast.data.archives.archive import Archive, ArchiveName
from regvq_fast.data.archives.archive_dataset import ArchiveDataset
from regvq_fast.data.archives.lookup import ARCHIVES, find_archive

__all__ = ["ARCHIVES", "Archive", "ArchiveDataset", "ArchiveName", "find_archive"]
