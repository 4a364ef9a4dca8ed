"""The discrete diffusion prior: a Transformer that predicts an image's tokens from noisy ones, given a text.

VQ-Diffusion (Gu et al., "Vector Quantized Diffusion Model for Text-to-Image Synthesis", CVPR 2022). The mathematics is
in `regvq_fast.priors.diffusion.loss`, the text in `regvq_fast.priors.diffusion.text`, sampling in
`regvq_fast.priors.diffusion.sampler`. A training step reads

    t, probability = timesteps.sample(seed, B, first_image)                    # TimestepSampler
    noisy = model.transition.corrupt(tokens, t, seed, first_image)
    logits = model(noisy, t, text, model.keep_text(B, 0.1, seed=seed, first_image=first_image))
    terms = diffusion_terms(model.transition, logits, tokens, noisy, t)
    terms.loss(t, probability, model.num_steps).backward()
    timesteps.update(t, terms.bound)

Shapes: tokens (B, h, w), in row-major order (B, L) with L = h * w; text (B, K, C_text); N codes; C = width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regvq_fast.models.attention import attention
from regvq_fast.models.model import Checkpointed, Model
from regvq_fast.models.transformer import SelfAttention, check_sizes, flat_ids, grid_shape, initialize
from regvq_fast.ops.noise import Stream, row_words
from regvq_fast.priors.conditions import Condition
from regvq_fast.priors.diffusion.loss import MaskAndReplace
from regvq_fast.priors.diffusion.text import TextEncoder, restore_text_encoder


class GELU2(nn.Module):
    """x * sigmoid(1.702 x), the GELU of VQ-Diffusion and CLIP."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        return x * torch.sigmoid(1.702 * x)


class AdaptiveLayerNorm(nn.Module):
    """LayerNorm whose scale and shift are a function of the step t (AdaLN)."""

    def __init__(self, width: int, num_steps: int) -> None:
        super().__init__()
        self.emb = nn.Embedding(num_steps, width)
        self.linear = nn.Linear(width, 2 * width)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Map x (B, L, C) and t (B,), 1 to T, to (B, L, C)."""
        scale, shift = self.linear(F.silu(self.emb(t - 1))).unsqueeze(1).chunk(2, dim=2)
        return F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift


class CrossAttention(nn.Module):
    """Multi-head attention of tokens to text; one linear layer gives key and value, in this order."""

    def __init__(self, width: int, text_width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.kv = nn.Linear(text_width, 2 * width)
        self.proj = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        """Map x (B, L, C) and text (B, K, C_text) to (B, L, C)."""
        query = self.query(x).unflatten(2, (self.heads, -1))
        key, value = self.kv(text).unflatten(2, (2, self.heads, -1)).unbind(2)
        return self.dropout(self.proj(attention(query, key, value).flatten(2)))


class DiffusionBlock(Checkpointed):
    """x + attention(AdaLN(x)), then x + attention(AdaLN(x), text), then x + mlp(norm(x))."""

    def __init__(self, width: int, text_width: int, heads: int, num_steps: int, dropout: float) -> None:
        super().__init__()
        self.ln1 = AdaptiveLayerNorm(width, num_steps)
        self.attn = SelfAttention(width, heads, dropout)
        self.ln_text = AdaptiveLayerNorm(width, num_steps)
        self.text_attn = CrossAttention(width, text_width, heads, dropout)
        self.ln2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), GELU2(), nn.Linear(4 * width, width), nn.Dropout(dropout))

    def layers(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """Map x (B, L, C), t (B,) and text (B, K, C_text) to (B, L, C)."""
        x = x + self.attn(self.ln1(x, t), attention)
        x = x + self.text_attn(self.ln_text(x, t), text)
        return x + self.mlp(self.ln2(x))


class VQDiffusion(Model):
    """p(x_0 | x_t, text) of all tokens; the defaults are VQ-Diffusion-B's.

    Padding and dropped captions are replaced by the null condition, a learned row for each position, so that attention
    needs no mask.

    Args:
        num_codes: N, the codes that tokens name; N itself is the mask.
        token_shape: (h, w) of an image's tokens.
        text_encoder: of captions, or of labels (`LabelEncoder`); kept as `self.text_encoder`, and trained with the
            prior unless it is frozen. None: text is given as features, or the prior is unconditional.
        text_shape: (K, C_text) of the features; ignored with an encoder.
        num_steps: T, the steps of the diffusion.
        width: C, a multiple of `heads`.
        depth: blocks.
        heads: attention heads.
        dropout: probability, in [0, 1), after attention and MLP of each block.
        null_condition: include one. Without it every image needs a text, padding keeps the encoder's features, and
            guidance is not possible.

    Raises:
        ValueError: a size that is not positive, a width that is not a multiple of `heads`, a dropout outside [0, 1).
    """

    title = "Diffusion prior over image tokens"
    pipeline_tag = "text-to-image"

    def __init__(
        self,
        num_codes: int = 1024,
        *,
        token_shape: Sequence[int] = (16, 16),
        text_encoder: TextEncoder | None = None,
        text_shape: Sequence[int] = (77, 512),
        num_steps: int = 100,
        width: int = 1024,
        depth: int = 19,
        heads: int = 16,
        dropout: float = 0.0,
        null_condition: bool = True,
    ) -> None:
        super().__init__()
        self.token_shape = grid_shape("token_shape", token_shape)
        self.text_shape = text_shape if text_encoder is None else text_encoder.shape
        if len(self.text_shape) != 2 or min(self.text_shape) < 1:
            raise ValueError(f"text_shape must be (positions, features), each at least 1, got {tuple(text_shape)}")
        self._arguments: dict[str, Any] = {
            "num_codes": num_codes,
            "token_shape": self.token_shape,
            "text_shape": tuple(self.text_shape),
            "num_steps": num_steps,
            "width": width,
            "depth": depth,
            "heads": heads,
            "dropout": dropout,
            "null_condition": null_condition,
        }
        check_sizes({"width": width, "depth": depth, "heads": heads}, dropout)
        self.transition = MaskAndReplace(num_codes, num_steps)
        self.num_codes, self.num_steps, self.num_tokens = num_codes, num_steps, math.prod(self.token_shape)

        self.tok_emb = nn.Embedding(num_codes + 1, width)
        self.row_emb = nn.Embedding(self.token_shape[0], width)
        self.column_emb = nn.Embedding(self.token_shape[1], width)
        positions, text_width = self.text_shape
        self.blocks = nn.ModuleList(DiffusionBlock(width, text_width, heads, num_steps, dropout) for _ in range(depth))
        self.ln_f = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_codes)
        self.apply(initialize)
        # Start from copying unmasked tokens: the head equals the embedding.
        self.head.weight.data.copy_(self.tok_emb.weight.data[:num_codes])
        # Rows of about unit length, as CLIP's features.
        null = torch.randn(positions, text_width) / math.sqrt(text_width)
        self.null_text = nn.Parameter(null) if null_condition else None
        self.text_encoder = text_encoder

    @property
    def conditioned_on(self) -> Condition:
        """Kind of condition of the text encoder."""
        return "none" if self.text_encoder is None else self.text_encoder.condition

    @property
    def label_names(self) -> tuple[str, ...]:
        """Names of the labels by id; empty unless images are conditioned on them."""
        return getattr(self.text_encoder, "names", ())

    def condition_ids(self, conditions: Any) -> Tensor | None:
        """Return captions or labels as ids (B, K, W) int64 on the CPU, for `forward`; None without an encoder."""
        return None if self.text_encoder is None else self.text_encoder.tokenize(conditions)

    def forward(self, tokens: Tensor, t: Tensor, text: Tensor | None = None, text_mask: Tensor | None = None) -> Tensor:
        """Return logits of p(x_0 | x_t, text).

        Args:
            tokens: x_t, (B, h, w) or (B, L) int64 in [0, num_codes], where num_codes is the mask.
            t: (B,) int64, 1 to T.
            text: features (B, K, C_text), or ids (B, K, W) int64 of `text_encoder`; None: the null condition.
            text_mask: (B, K) or (B, 1) bool, False where the null condition replaces the text; combined with the mask
                of ids.

        Returns:
            (B, L, N).

        Raises:
            ValueError: other shapes, a missing null condition, ids without an encoder.
            TypeError: tokens that are not int64.
        """
        tokens = flat_ids("tokens", tokens, self.token_shape, self.num_codes + 1)
        if t.shape != (len(tokens),):
            raise ValueError(f"t must be ({len(tokens)},), one step an image, got {tuple(t.shape)}")
        condition = self.condition(len(tokens), text, text_mask)
        positions = self.row_emb.weight[:, None] + self.column_emb.weight
        x = self.tok_emb(tokens) + positions.flatten(0, 1)
        for block in self.blocks:
            x = block(x, t, condition)
        return self.head(self.ln_f(x))

    def condition(self, batch: int, text: Tensor | None = None, text_mask: Tensor | None = None) -> Tensor:
        """Return the condition (B, K, C_text) that tokens attend to: the text, or the null condition where masked.

        `forward` accepts the result as text without a mask. Arguments and errors are as in `forward`.
        """
        if text is not None and not text.is_floating_point():
            if self.text_encoder is None:
                raise ValueError(f"text of type {text.dtype} needs a text_encoder, which this model has none of")
            text, written = self.text_encoder(text)
            if self.null_text is not None:
                text_mask = written if text_mask is None else written & text_mask
        positions = self.text_shape[0]
        if text is not None and text.shape != (batch, *self.text_shape):
            wanted = (batch, *self.text_shape)
            raise ValueError(f"text must be {wanted}, features of as many captions as images, got {tuple(text.shape)}")
        if text_mask is not None and text_mask.shape not in ((batch, positions), (batch, 1)):
            raise ValueError(f"text_mask must be ({batch}, {positions}) or ({batch}, 1), got {tuple(text_mask.shape)}")
        if text is not None:
            text = text.to(self.tok_emb.weight.dtype)
            if text_mask is None:
                return text
        if self.null_text is None:
            raise ValueError("this model has no null condition: give text, without a mask, to every image")
        if text is None or text_mask is None:
            return self.null_text.expand(batch, -1, -1)
        return torch.where(text_mask[:, :, None], text, self.null_text)

    def keep_text(
        self, batch: int, dropout: float = 0.1, *, seed: Tensor, first_image: int | Tensor = 0
    ) -> Tensor | None:
        """Return a text_mask (B, 1) that drops captions, to train the null condition; None if ``dropout`` is 0.

        The mask is a function of (seed, global number of the image).

        Raises:
            ValueError: a dropout outside [0, 1], or above 0 for a model without a null condition.
        """
        if not 0.0 <= dropout <= 1.0:
            raise ValueError(f"dropout is a probability and must lie in [0, 1], got {dropout}")
        if dropout == 0.0:
            return None
        if self.null_text is None:
            raise ValueError(f"captions can't be dropped ({dropout}) without a null condition, which this model lacks")
        images = torch.arange(batch, device=seed.device) + first_image
        return row_words(seed, images, Stream.DROPPED_CAPTIONS)[:, None] >= int(dropout * 2**32)

    def tokenize_text(self, captions: Sequence[str]) -> Tensor:
        """Convert captions to ids (B, K, W) on the CPU, by the text encoder.

        Raises:
            ValueError: no text encoder, no captions, or an empty or over-long one.
            TypeError: not a sequence of str.
        """
        if self.text_encoder is None:
            raise ValueError("captions need a text_encoder, which this model has none of: give features")
        return self.text_encoder.tokenize(captions)

    def architecture(self) -> dict[str, Any]:
        """Return the arguments of the model as plain values, with those of its encoder under "text_encoder"."""
        encoder = None if self.text_encoder is None else self.text_encoder.architecture()
        return {**super().architecture(), "text_encoder": encoder}

    @classmethod
    def _build(cls, text_encoder: Mapping[str, Any] | None = None, **arguments: Any) -> Self:
        return cls(text_encoder=None if text_encoder is None else restore_text_encoder(text_encoder), **arguments)
