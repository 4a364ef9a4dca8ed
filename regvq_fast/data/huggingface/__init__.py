"""Data sets in the form of Hugging Face's library ``datasets``: from the hub, saved on disk, or in parquet files."""

from regvq_fast.data.huggingface.images import HuggingFaceImages
from regvq_fast.data.huggingface.stream import HuggingFaceStream

__all__ = ["HuggingFaceImages", "HuggingFaceStream"]
