"""Data sets of Hugging Face's library ``datasets``: from the hub, saved on disk, or in parquet files."""

from regvq_fast.data.huggingface.stream import HuggingFaceStream
from regvq_fast.data.huggingface.table import HuggingFaceImages

__all__ = ["HuggingFaceImages", "HuggingFaceStream"]
