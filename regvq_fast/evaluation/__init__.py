"""Metrics and pictures of a trained tokenizer."""

from regvq_fast.evaluation.codebook import CodebookUsage
from regvq_fast.evaluation.pictures import save_codebook_mosaic, save_reconstruction_grid, save_usage_histogram
from regvq_fast.evaluation.reconstruction import ReconstructionMetrics, evaluate_reconstruction

__all__ = [
    "CodebookUsage",
    "ReconstructionMetrics",
    "evaluate_reconstruction",
    "save_codebook_mosaic",
    "save_reconstruction_grid",
    "save_usage_histogram",
]
