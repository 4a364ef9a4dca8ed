"""Metrics and images of trained models."""

from regvq_fast.evaluation.codebook import CodebookUsage
from regvq_fast.evaluation.feature_nets import FeatureNet, PerceptualDistance, load_feature_net
from regvq_fast.evaluation.fid import Reference, frechet_distance, make_reference, statistics_of
from regvq_fast.evaluation.metrics import (
    SampledImages,
    TokenizerMetrics,
    evaluate_tokenizer,
    fid_of_samples,
    open_samples,
)
from regvq_fast.evaluation.plots import (
    save_codebook_mosaic,
    save_entropy_map,
    save_labelled_rows,
    save_reconstruction_grid,
    save_usage_histogram,
)
from regvq_fast.evaluation.reconstruction_metrics import ReconstructionMetrics, evaluate_reconstruction
from regvq_fast.evaluation.sample_metrics import inception_score, precision_and_recall
from regvq_fast.evaluation.suite import ReferenceBatch, SuiteMetrics, evaluate_samples

__all__ = [
    "CodebookUsage",
    "FeatureNet",
    "PerceptualDistance",
    "ReconstructionMetrics",
    "Reference",
    "ReferenceBatch",
    "SampledImages",
    "SuiteMetrics",
    "TokenizerMetrics",
    "evaluate_reconstruction",
    "evaluate_samples",
    "evaluate_tokenizer",
    "fid_of_samples",
    "frechet_distance",
    "inception_score",
    "load_feature_net",
    "make_reference",
    "open_samples",
    "precision_and_recall",
    "save_codebook_mosaic",
    "save_entropy_map",
    "save_labelled_rows",
    "save_reconstruction_grid",
    "save_usage_histogram",
    "statistics_of",
]
