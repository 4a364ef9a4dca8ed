"""The autoregressive prior: a causal transformer over the tokens of an image, after those of its condition.

The network is the minGPT of taming-transformers (Esser, Rombach, Ommer, "Taming Transformers for High-Resolution Image
Synthesis", CVPR 2021): pre-LayerNorm blocks, exact GELU, learned positions. Its checkpoints load with
`TokenTransformer.load_taming_state_dict`. Two things differ in layout: query, key and value are one product (`qkv`),
and the condition has its own embedding (`cond_emb`), with one more row for the null condition of classifier-free
guidance. With `arch="llama"` the blocks are those of `regvq_fast.models.llama`, which rotate queries and keys by their
positions instead.

Shapes: tokens (B, h, w), in row-major order (B, L) with L = h * w; condition (B, h', w') or (B, K) with K = h' * w';
N codes; C = width.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regvq_fast.models.attention import KeyValueCache, attention
from regvq_fast.models.llama import LlamaBlock, RMSNorm, grid_rotation
from regvq_fast.models.transformer import INIT_STD, Block, check_sizes, grid_sinusoids, initialize
from regvq_fast.models.weights import LoadedWeights, check_state_dict, nested_state_dict, strip_prefix
from regvq_fast.ops.noise import Stream, row_words
from regvq_fast.priors.class_ids import ClassIdModel
from regvq_fast.settings import check_probabilities

Arch = Literal["taming", "llama"]
_BLOCKS: dict[str, tuple[type[Block | LlamaBlock], type[nn.Module]]] = {  # block, and norm after the last one
    "taming": (Block, nn.LayerNorm),
    "llama": (LlamaBlock, RMSNorm),
}


class TokenTransformer(ClassIdModel):
    """p(image tokens | condition), token by token; the defaults are taming's for semantic synthesis.

    The sequence is the K ids of the condition, then the L tokens. A position attends to itself and to those before it.
    The condition is a semantic map; or a label, which is one id; or nothing, one id that is always the null condition.

    Args:
        num_codes: N, the codes that image tokens name.
        num_classes: ids of the condition; the id `num_classes` is the null condition. 0: unconditional.
        token_shape: (h, w) of an image's tokens.
        condition_shape: (h', w') of a map; None: `token_shape`.
        label_names: names of the `num_classes` labels; empty: the condition is a map.
        width: C, a multiple of `heads`.
        depth: blocks.
        heads: attention heads.
        dropout: probability, in [0, 1), on the embeddings and after attention and MLP of each block; not on attention
            weights, which are never materialized.
        arch: "taming" or "llama": kind of blocks, positions and initialization.

    Raises:
        ValueError: a size that is not positive, a width that is not a multiple of `heads` (llama: of 4 times as many),
            a dropout outside [0, 1), another `arch`.
    """

    title = "Autoregressive prior over image tokens"

    def __init__(
        self,
        num_codes: int = 1024,
        num_classes: int = 151,
        *,
        token_shape: Sequence[int] = (16, 16),
        condition_shape: Sequence[int] | None = None,
        label_names: Sequence[str] = (),
        width: int = 1024,
        depth: int = 24,
        heads: int = 16,
        dropout: float = 0.0,
        arch: str = "taming",
    ) -> None:
        super().__init__(num_codes, num_classes, token_shape, condition_shape, label_names)
        self._arguments: dict[str, Any] = {
            "num_codes": num_codes,
            "num_classes": num_classes,
            "token_shape": self.token_shape,
            "condition_shape": self.condition_shape,
            "label_names": self.label_names,
            "width": width,
            "depth": depth,
            "heads": heads,
            "dropout": dropout,
            "arch": arch,
        }
        sizes = ("num_codes", "width", "depth", "heads")
        check_sizes({name: self._arguments[name] for name in sizes}, dropout)
        if arch not in get_args(Arch):
            raise ValueError(f'arch must be "taming" or "llama", got {arch!r}')
        if arch == "llama" and width % (4 * heads):
            raise ValueError(
                f'arch "llama" rotates channels of a head in fours: width must be a multiple of 4 * heads, got width '
                f"{width} and {heads} heads"
            )
        self.arch = arch

        self.tok_emb = nn.Embedding(num_codes, width)
        self.cond_emb = nn.Embedding(num_classes + 1, width)
        self.drop = nn.Dropout(dropout)
        block, norm = _BLOCKS[arch]
        self.blocks = nn.ModuleList(block(width, heads, dropout) for _ in range(depth))
        self.ln_f = norm(width)
        self.head = nn.Linear(width, num_codes, bias=False)
        self.apply(initialize)
        # A row for each position: added to its embedding (taming), or rotating its queries and keys (llama).
        self.pos_emb: Tensor
        if arch == "llama":
            rotation = grid_rotation(self.condition_shape, self.token_shape, width // heads)
            self.register_buffer("pos_emb", rotation, persistent=False)
            nn.init.zeros_(self.head.weight)
            # Without biases, attention by position alone needs a component that all tokens have in common, and one that
            # all ids of the condition have in common (docs/priors.md).
            with torch.no_grad():
                for embedding in (self.tok_emb, self.cond_emb):
                    embedding.weight += nn.init.normal_(torch.empty(width), std=INIT_STD)
        else:
            self.pos_emb = nn.Parameter(_first_positions(self.condition_shape, self.token_shape, width))

    # ----------------------------------------------------------------------------------------------------- training

    def forward(self, tokens: Tensor, condition: Tensor) -> Tensor:
        """Return logits of every token, given the condition and the tokens before it.

        Args:
            tokens: (B, h, w) or (B, L) int64 in [0, num_codes). The last one is ignored.
            condition: (B, h', w') or (B, K) int64 in [0, num_classes].

        Returns:
            (B, L, N) logits; those at position i are of token i.

        Raises:
            ValueError: other shapes; on a CPU, ids out of range.
            TypeError: not int64.
        """
        return self.head(self._hidden(tokens, condition))

    def loss(self, tokens: Tensor, condition: Tensor, *, inputs: Tensor | None = None) -> Tensor:
        """Return the mean cross-entropy in nats a token, computed in fp32.

        Only the logits of one chunk of rows are in memory at a time; with several chunks, backward recomputes them.

        Args:
            tokens, condition: as in `forward`; the tokens are the targets.
            inputs: tokens that the network sees, if they differ (see `corrupt`); None: `tokens`.

        Returns:
            0-dim float32.

        Raises: as `forward`.
        """
        inputs = tokens if inputs is None else inputs
        if len(inputs) != len(tokens):
            raise ValueError(f"inputs and tokens must be of equally many images, got {len(inputs)}, {len(tokens)}")
        hidden = self._hidden(inputs, condition).flatten(0, 1)
        targets = self._flat_tokens(tokens).flatten()
        return torch.stack(self._by_chunks(self._summed_loss, hidden, targets)).sum() / len(targets)

    def corrupt(
        self,
        tokens: Tensor,
        condition: Tensor,
        *,
        seed: Tensor,
        first_image: int | Tensor,
        keep: float = 1.0,
        condition_dropout: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        """Corrupt inputs for training: random tokens among the true ones, the null condition for some images.

        The first is taming's regularizer `pkeep`; the second trains the null condition for classifier-free guidance.
        Random numbers are a function of (seed, global number of the image, position), however a batch is split.

        Args:
            tokens, condition: as in `forward`.
            seed: 0-dim int64 tensor.
            first_image: global number of the first image; a 0-dim tensor if it changes under `torch.compile`.
            keep: probability that a token stays; otherwise it becomes a uniformly sampled code.
            condition_dropout: probability that an image loses its condition.

        Returns:
            Tokens (B, L) and condition (B, K).

        Raises:
            ValueError: a probability outside [0, 1], or shapes as in `forward`.
            TypeError: not int64.
        """
        check_probabilities({"keep": keep})
        tokens = self._flat_tokens(tokens)
        if keep < 1.0:
            images = torch.arange(len(tokens), device=tokens.device) + first_image
            positions = images[:, None] * self.num_tokens + torch.arange(self.num_tokens, device=tokens.device)
            kept = row_words(seed, positions, Stream.KEPT_TOKENS) < int(keep * 2**32)
            replacements = (row_words(seed, positions, Stream.REPLACED_TOKENS) * self.num_codes) >> 32
            tokens = torch.where(kept, tokens, replacements)
        return tokens, self.drop_condition(condition, condition_dropout, seed=seed, first_image=first_image)

    # ----------------------------------------------------------------------------------------------------- sampling

    def prefill(self, condition: Tensor) -> tuple[Tensor, KeyValueCache]:
        """Process the condition in one pass; return logits (B, N) of the first token, and the cache for `decode`.

        Raises: as `forward`.
        """
        cache = KeyValueCache(len(self.blocks), self.condition_length + self.num_tokens)
        x, rotation = self._placed(self.cond_emb(self._flat_condition(condition)))
        for layer, block in enumerate(self.blocks):
            x = block(x, functools.partial(cache.fill, layer), *rotation)
        return self.head(self.ln_f(x[:, -1])), cache

    def decode(self, tokens: Tensor, index: Tensor, cache: KeyValueCache, *, reached: int | None = None) -> Tensor:
        """Process one more token of each image.

        Args:
            tokens: (B,) int64, the tokens at `index`.
            index: 0-dim int64 tensor, position in the image, from 0 on.
            cache: holds the condition and all earlier tokens; this token is added.
            reached: `index` + 1 as an int: attention is over the filled part of the cache, with growing shapes. None:
                over the whole cache with a mask, with static shapes.

        Returns:
            Logits (B, N) of the token at `index` + 1.
        """
        position = index + self.condition_length
        span = cache.length if reached is None else self.condition_length + reached
        mask = cache.mask(position) if reached is None else None
        x, rotation = self._placed(self.tok_emb(tokens).unsqueeze(1), position)
        for layer, block in enumerate(self.blocks):
            x = block(x, functools.partial(cache.extend, layer, position, span, mask), *rotation)
        return self.head(self.ln_f(x[:, -1]))

    # ------------------------------------------------------------------------------------------------------ weights

    @torch.no_grad()
    def load_taming_state_dict(self, state_dict: Mapping) -> LoadedWeights:
        """Load taming's `GPT`: its state dict, or one of a `Net2NetTransformer` that has it as `transformer.*`.

        The state dict may be nested under "state_dict", and a common prefix of all names, such as "module.", is
        stripped. taming has one embedding for condition and image, which is copied to both of ours. The null condition,
        which taming lacks, keeps its weights. A checkpoint does not contain the number of heads: it must match.

        Returns:
            The number of tensors loaded, the names left out, and the prefix.

        Raises:
            ValueError: missing or unexpected names, wrong shapes, more classes than the shared embedding has, or
                attention that is not causal (`n_unmasked`); nothing is loaded then.
        """
        if self.arch != "taming":
            raise ValueError(
                f'taming has no arch "{self.arch}": its checkpoints load into TokenTransformer(arch="taming")'
            )
        names = self.state_dict().keys()
        given, prefix, outside = strip_prefix(nested_state_dict(state_dict), names, "this TokenTransformer")
        for name in [name for name in given if name.endswith("attn.mask")]:
            mask = given.pop(name)
            if not torch.equal(mask, mask.tril()):
                raise ValueError(f"{name} lets positions see later ones (n_unmasked > 0), which this model can't")
        parts, own = ("query", "key", "value"), self.state_dict()
        expected = {
            name: value.shape for name, value in own.items() if ".qkv." not in name and name != "cond_emb.weight"
        }
        fused = [name for name in own if ".qkv." in name]
        for name in fused:
            shape = torch.Size([own[name].shape[0] // 3, *own[name].shape[1:]])
            expected |= {name.replace("qkv", part): shape for part in parts}
        check_state_dict(given, expected, "this TokenTransformer")
        if self.num_classes > self.num_codes:
            raise ValueError(
                f"the checkpoint has one embedding of {self.num_codes} ids for image and condition, too few for the "
                f"{self.num_classes} classes of this TokenTransformer"
            )
        weights = {name: given[name] for name in expected if name in own}
        weights |= {name: torch.cat([given[name.replace("qkv", part)] for part in parts]) for name in fused}
        self.load_state_dict(weights, strict=False)
        self.cond_emb.weight[: self.num_classes] = self.tok_emb.weight[: self.num_classes]
        return LoadedWeights(len(given), outside, prefix)

    # ----------------------------------------------------------------------------------------------------- internal

    def _hidden(self, tokens: Tensor, condition: Tensor) -> Tensor:
        """Return the input of the head, (B, L, C)."""
        tokens, condition = self._flat_tokens(tokens), self._flat_condition(condition)
        if len(tokens) != len(condition):
            raise ValueError(
                f"tokens and condition must be of equally many images, got {len(tokens)}, {len(condition)}"
            )
        x, rotation = self._placed(torch.cat([self.cond_emb(condition), self.tok_emb(tokens[:, :-1])], dim=1))
        causal = functools.partial(attention, causal=True)
        for block in self.blocks:
            x = block(x, causal, *rotation)
        return self.ln_f(x[:, self.condition_length - 1 :])

    def _placed(self, embeddings: Tensor, position: Tensor | None = None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the input of the first block, and the rotation, if there is one, for all blocks.

        The embeddings (B, L, C) are of the first L positions, or of the one at `position`, a 0-dim int64 tensor.
        """
        if position is None:
            rows = self.pos_emb[:, : embeddings.shape[1]]
        else:
            rows = self.pos_emb.index_select(1, position.view(1))
        return (self.drop(embeddings), (rows,)) if self.arch == "llama" else (self.drop(embeddings + rows), ())

    def _summed_loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.head(hidden).float(), targets, reduction="sum")


def _first_positions(condition_shape: tuple[int, int], token_shape: tuple[int, int], width: int) -> Tensor:
    """Return taming's position embeddings (1, K + L, C) before training.

    The position that predicts a token has the same embedding as that token's position in the map, so that attention
    between them need not be learned first (docs/priors.md). The last row is never used; taming's checkpoints have it.
    """
    condition, tokens = (grid_sinusoids(shape, width) for shape in (condition_shape, token_shape))
    return torch.cat([condition[:-1], tokens, torch.zeros(1, width)])[None]
