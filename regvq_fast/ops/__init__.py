"""Fused ops for vector quantization, to import into any VQ model.

Each op is one file: public function, PyTorch fallback, registration with ``torch.library``, backward, autograd. The
fallback of ``vector_quantize`` has a file of its own.
"""

from regvq_fast.ops.assign_codes import assign_codes
from regvq_fast.ops.segment_sum import segment_sum
from regvq_fast.ops.softmax_statistics import softmax_statistics
from regvq_fast.ops.vector_quantize import VectorQuantizeOutput, vector_quantize
from regvq_fast.ops.weighted_info_nce import weighted_info_nce

__all__ = [
    "VectorQuantizeOutput",
    "assign_codes",
    "segment_sum",
    "softmax_statistics",
    "vector_quantize",
    "weighted_info_nce",
]
