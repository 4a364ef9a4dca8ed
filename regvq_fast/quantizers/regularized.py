"""Reg-VQ: regularized vector quantization (Zhang et al., CVPR 2023, section 3)."""

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regvq_fast.losses.prior import PriorScope, posterior_groups, prior_kl, scoped_posterior
from regvq_fast.ops import vector_quantize
from regvq_fast.ops.vector_quantize import CodebookGrad
from regvq_fast.quantizers.base import Quantizer, QuantizerOutput, draw_seed, wide
from regvq_fast.quantizers.mask import MaskMode, stochastic_mask

LogitKind = Literal["distance", "linear", "cosine"]


class RegularizedQuantizer(Quantizer):
    """Stochastic-mask quantization with a straight-through softmax gradient and a prior-distribution regularizer.

    A fresh quantizer must neither pick codes at random nor ignore its noise, whatever its logits. So one number sets
    the scale of all three kinds: ``logit_std``, the standard deviation over the codes of a fresh row's logits, to be
    read against the Gumbel noise's own 1.28. It counts on encoder outputs of unit variance, which
    ``VQGAN.standardize_latents`` gives a fresh model. All codes start on one sphere, so that none is the nearest of
    every row:

    - "distance" (default): ``-scale |x - z|^2``, codes of norm sqrt(D), ``scale = logit_std / (2 sqrt(D))``;
    - "linear": ``x . w + b``, w ~ N(0, logit_std^2 / D), a predicted token distribution beside the codebook;
    - "cosine": the same for x and z of length 1, so ``2 scale cos(x, z)`` and a constant,
      ``scale = logit_std sqrt(D) / 2``; the codes are the normalised embeddings.

    Args:
        num_codes: N.
        code_dim: D.
        logits: "distance", "linear" or "cosine".
        logit_std: see above.
        mask_ratio: share of stochastic positions in training.
        mask_mode: "exact" (floor(ratio * H * W) an image) or "bernoulli".
        tau: Gumbel-softmax temperature of the stochastic rows' gradient.
        prior_weight: weight of the KL divergence between posterior and uniform prior, per nat.
        prior_scope: rows that share a posterior: "image", "batch" or "global" (the batches of all ranks).
        codebook_grad: see :func:`regvq_fast.ops.vector_quantize`.

    Raises:
        ValueError: a setting that is out of range, or none of the known ones.
    """

    expects_unit_variance = True

    def __init__(
        self,
        num_codes: int,
        code_dim: int,
        *,
        logits: LogitKind = "distance",
        logit_std: float = 4.0,
        mask_ratio: float = 0.4,
        mask_mode: MaskMode = "exact",
        tau: float = 0.9,
        prior_weight: float = 0.1,
        prior_scope: PriorScope = "batch",
        codebook_grad: CodebookGrad = "soft",
    ) -> None:
        super().__init__(num_codes, code_dim)
        choices = {
            "logits": (logits, LogitKind),
            "mask_mode": (mask_mode, MaskMode),
            "prior_scope": (prior_scope, PriorScope),
            "codebook_grad": (codebook_grad, CodebookGrad),
        }
        for name, (choice, known) in choices.items():
            if choice not in get_args(known):
                raise ValueError(f"{name} must be one of {', '.join(map(repr, get_args(known)))}, got {choice!r}")
        if not 0 <= mask_ratio <= 1:
            raise ValueError(f"mask_ratio must be between 0 and 1, got {mask_ratio}")
        for name, value in (("tau", tau), ("logit_std", logit_std)):
            if not value > 0:
                raise ValueError(f"{name} must be greater than 0, got {value}")
        if not prior_weight >= 0:
            raise ValueError(f"prior_weight must not be negative, got {prior_weight}")
        self.logits = logits
        self.mask_ratio, self.mask_mode, self.tau = mask_ratio, mask_mode, tau
        self.prior_weight, self.prior_scope = prior_weight, prior_scope
        self.codebook_grad = codebook_grad
        with torch.no_grad():
            self.embedding.weight.copy_(math.sqrt(code_dim) * F.normalize(self.embedding.weight, dim=1))
        if logits == "distance":
            self.scale = logit_std / (2 * math.sqrt(code_dim))
        elif logits == "cosine":
            self.scale = logit_std * math.sqrt(code_dim) / 2
        else:
            self.scale = 1.0
            self.proj = nn.Linear(code_dim, num_codes)
            nn.init.normal_(self.proj.weight, std=logit_std / math.sqrt(code_dim))
            nn.init.zeros_(self.proj.bias)

    def codes(self) -> Tensor:
        return F.normalize(wide(self.embedding.weight), dim=1) if self.logits == "cosine" else self.embedding.weight

    def forward(self, z: Tensor, seed: Tensor | None = None, row_offset: int | Tensor = 0) -> QuantizerOutput:
        with torch.autocast(z.device.type, enabled=False):
            rows = self._to_rows(z)
            batch, _, height, width = z.shape
            if self.logits == "cosine":
                rows = F.normalize(rows, dim=1)
            mask = None
            if self.training and self.mask_ratio > 0:
                seed = draw_seed(z.device) if seed is None else seed
                mask = stochastic_mask(
                    batch, height * width, self.mask_ratio, seed, mode=self.mask_mode, row_offset=row_offset
                )
            linear = self.logits == "linear"
            # Only in training do all ranks come here together.
            scope = "batch" if self.prior_scope == "global" and not self.training else self.prior_scope
            groups = posterior_groups(scope, batch)
            out = vector_quantize(
                rows,
                wide(self.codes()),
                weight=wide(self.proj.weight) if linear else None,
                bias=wide(self.proj.bias) if linear else None,
                scale=self.scale,
                mask=mask,
                seed=seed,
                row_offset=row_offset,
                tau=self.tau,
                groups=groups,
                codebook_grad=self.codebook_grad,
            )
            posterior, ranks = scoped_posterior(out.posterior, scope)
            kl = prior_kl(posterior, len(rows) // groups * ranks)
            if mask is None:
                mask = torch.zeros_like(out.indices, dtype=torch.bool)
            perturbed = (out.indices != out.best_indices).float().sum() / mask.sum().clamp(min=1)
            return QuantizerOutput(
                self._to_maps(out.quantized, z),
                self._to_maps(out.indices, z),
                self.prior_weight * kl,
                {"kl": kl.detach(), "perturbed": perturbed},
                self._to_maps(out.perturbation, z),
                self._to_maps(mask, z),
            )

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, logits={self.logits!r}, scale={self.scale:.4g}, mask_ratio={self.mask_ratio}, "
            f"tau={self.tau}, prior_weight={self.prior_weight}, prior_scope={self.prior_scope!r}"
        )
