"""The masked prior: a bidirectional transformer that predicts the masked tokens of an image from all others.

MaskGIT (Chang, Zhang, Jiang, Liu, Freeman, "MaskGIT: Masked Generative Image Transformer", CVPR 2022). In training, a
fraction cos(pi / 2 * u) of the tokens, u uniform in [0, 1), is replaced by the mask, and the loss is their
cross-entropy; sampling is in `regvq_fast.priors.maskgit.sampler`. As in the paper, the head has the weights of the
token embedding. Two differences: LayerNorm comes before attention and MLP, not after, and the condition has its own
embedding, with one more row for the null condition of classifier-free guidance.

Shapes: tokens (B, h, w), in row-major order (B, L) with L = h * w; condition (B, K), K = L for a map (B, h, w), else 1;
N codes; C = width.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regvq_fast.models.attention import attention
from regvq_fast.models.transformer import Block, check_sizes, flat_ids, grid_sinusoids, initialize
from regvq_fast.ops.noise import Stream, row_words
from regvq_fast.priors.choosing import token_rows
from regvq_fast.priors.class_ids import ClassIdModel

_WORDS = 2**32


class MaskGIT(ClassIdModel):
    """p(masked token | other tokens, condition) for each token; the defaults are the paper's for ImageNet.

    Every position attends to all. The condition is a semantic map, whose id at each token is added to the embedding; or
    a label, one id before the tokens, as in the paper; or nothing, one id that is always the null condition.

    Args:
        num_codes: N, the number of codes; N itself is the mask.
        num_classes: ids of the condition; the id `num_classes` is the null condition. 0: unconditional.
        token_shape: (h, w) of an image's tokens.
        label_names: names of the `num_classes` labels; empty: the condition is a map.
        width: C, a multiple of `heads`.
        depth: blocks.
        heads: attention heads.
        dropout: probability, in [0, 1), on the embeddings and after attention and MLP of each block.

    Raises:
        ValueError: a size that is not positive, a width that is not a multiple of `heads`, a dropout outside [0, 1).
    """

    title = "Masked prior over image tokens"

    def __init__(
        self,
        num_codes: int = 1024,
        num_classes: int = 1000,
        *,
        token_shape: Sequence[int] = (16, 16),
        label_names: Sequence[str] = (),
        width: int = 768,
        depth: int = 24,
        heads: int = 8,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(num_codes, num_classes, token_shape, None, label_names)
        sizes = {"num_codes": num_codes, "width": width, "depth": depth, "heads": heads}
        check_sizes(sizes, dropout)
        self._arguments: dict[str, Any] = {
            **sizes,
            "num_classes": num_classes,
            "token_shape": self.token_shape,
            "label_names": self.label_names,
            "dropout": dropout,
        }
        self.tok_emb = nn.Embedding(num_codes + 1, width)
        self.cond_emb = nn.Embedding(num_classes + 1, width)
        grids = [self.token_shape] if self.conditioned_on == "segmentation" else [(1, 1), self.token_shape]
        self.pos_emb = nn.Parameter(torch.cat([grid_sinusoids(grid, width) for grid in grids])[None])
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(depth))
        self.ln_f = nn.LayerNorm(width)
        self.bias = nn.Parameter(torch.zeros(num_codes))
        self.apply(initialize)

    def forward(self, tokens: Tensor, condition: Tensor) -> Tensor:
        """Return logits of every token, given the unmasked tokens and the condition.

        Args:
            tokens: (B, h, w) or (B, L) int64 in [0, num_codes], where num_codes is the mask.
            condition: (B, K), or a map (B, h, w), int64 in [0, num_classes].

        Returns:
            (B, L, N).

        Raises:
            ValueError: other shapes; on a CPU, ids out of range.
            TypeError: not int64.
        """
        return self._head(self._hidden(tokens, condition))

    def loss(self, tokens: Tensor, condition: Tensor, masked: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
        """Return the mean cross-entropy of the masked tokens of each image, computed in fp32.

        Only the logits of one chunk of rows are in memory at a time; with several chunks, backward recomputes them.

        Args:
            tokens, condition: as in `forward`; the tokens, without masks, are the targets.
            masked: (B, L) bool, True for the positions to mask.
            label_smoothing: fraction of the target that is spread equally over all codes.

        Returns:
            (B,) float32, in nats per masked token.

        Raises: as `forward`.
        """
        tokens = self._flat_tokens(tokens)
        hidden = self._hidden(tokens.masked_fill(masked, self.num_codes), condition).flatten(0, 1)
        losses = self._by_chunks(functools.partial(self._losses, label_smoothing), hidden, tokens.flatten())
        return (torch.cat(losses).view_as(masked) * masked).sum(1) / masked.sum(1).clamp(min=1)

    def mask(self, counts: Tensor, *, seed: Tensor, first_image: int | Tensor) -> Tensor:
        """Choose tokens of each image to mask, all with the same probability.

        Args:
            counts: (B,) int64, number of tokens to mask.
            seed, first_image: the choice is a function of (seed, global number of the image).

        Returns:
            (B, L) bool.
        """
        rows = token_rows(counts[:, None].expand(-1, self.num_tokens), first_image)
        # Positions break ties between equal words.
        keys = row_words(seed, rows, Stream.MASKED_TOKENS) * self.num_tokens + rows % self.num_tokens
        return keys.argsort(1).argsort(1) < counts[:, None]

    def training_counts(self, batch: int, *, seed: Tensor, first_image: int | Tensor) -> Tensor:
        """Return the numbers (B,) int64 of tokens to mask, ceil(L cos(pi / 2 * u)) with u uniform in (0, 1)."""
        uniform = (_ratio_words(batch, seed, first_image).double() + 0.5) / _WORDS
        return (self.num_tokens * torch.cos(math.pi / 2 * uniform)).ceil().long()

    def uniform_counts(self, batch: int, *, seed: Tensor, first_image: int | Tensor) -> Tensor:
        """Return the numbers (B,) int64 of tokens to mask, uniform from 1 to L."""
        return 1 + (_ratio_words(batch, seed, first_image) * self.num_tokens >> 32)

    def _hidden(self, tokens: Tensor, condition: Tensor) -> Tensor:
        """Return the input of the head, (B, L, C)."""
        tokens = flat_ids("tokens", tokens, self.token_shape, self.num_codes + 1)
        condition = self._flat_condition(condition)
        if len(tokens) != len(condition):
            raise ValueError(
                f"tokens and condition must be of equally many images, got {len(tokens)}, {len(condition)}"
            )
        x, condition = self.tok_emb(tokens), self.cond_emb(condition)
        x = x + condition if self.conditioned_on == "segmentation" else torch.cat([condition, x], dim=1)
        x = self.drop(x + self.pos_emb)
        for block in self.blocks:
            x = block(x, attention)
        return self.ln_f(x[:, -self.num_tokens :])

    def _head(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.tok_emb.weight[: self.num_codes], self.bias)

    def _losses(self, label_smoothing: float, hidden: Tensor, targets: Tensor) -> Tensor:
        logits = self._head(hidden).float()
        return F.cross_entropy(logits, targets, reduction="none", label_smoothing=label_smoothing)


def _ratio_words(batch: int, seed: Tensor, first_image: int | Tensor) -> Tensor:
    images = torch.arange(batch, device=seed.device) + first_image
    return row_words(seed, images, Stream.MASK_RATIOS)
