"""Text encoders of the diffusion prior, from captions to features.

    ids = encoder.tokenize(captions)    # (B, K, W) int64 on the CPU, for example in a loader's worker
    features, mask = encoder(ids)       # (B, K, C), and (B, K) which is True for text

K positions per caption, C features per position. `WordEncoder` is small and trains with the prior.
`PretrainedTextEncoder` is frozen, by default CLIP's, as in VQ-Diffusion. `LabelEncoder` is for labels: a label is a
text of one learned word.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import inspect
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regvq_fast.invocation import install
from regvq_fast.models.attention import attention
from regvq_fast.models.model import weights_of_its_own
from regvq_fast.models.pretrained import restore
from regvq_fast.models.transformer import Block, check_sizes, initialize
from regvq_fast.priors.conditions import Condition, label_ids

CLIP = "openai/clip-vit-base-patch32"

_WORD = re.compile(r"\w+|[^\w\s]")
_DEFAULT_TOKENS = 77  # CLIP's; for tokenizers without a limit
_MOST_TOKENS = 512  # a larger limit means that the tokenizer has none


class TextFeatures(NamedTuple):
    """Features of captions."""

    features: Tensor
    """(B, K, C)."""
    mask: Tensor
    """(B, K) bool, True for text."""


class TextEncoder(nn.Module, ABC):
    """Encoder of captions. A subclass keeps each argument of its constructor as an attribute of the same name."""

    condition: ClassVar[Condition] = "caption"
    """Kind of condition that it encodes."""
    shape: tuple[int, int]
    """(K, C)."""
    truncate: bool
    """Truncate long captions instead of raising an error."""

    @abstractmethod
    def tokenize(self, captions: Any) -> Tensor:
        """Convert captions (B strings) to ids (B, K, W) int64 on the CPU, for `forward`.

        Raises:
            ValueError: no captions, an empty one, or one that is too long.
            TypeError: not a sequence of str.
        """

    @abstractmethod
    def forward(self, ids: Tensor) -> TextFeatures:
        """Return features and mask of ids (B, K, W) from `tokenize`, on the encoder's device."""

    def architecture(self) -> dict[str, Any]:
        """Return plain values from which `restore_text_encoder` builds an equal encoder, without its weights."""
        arguments = inspect.signature(type(self)).parameters
        return {"type": type(self).__name__, **{name: getattr(self, name) for name in arguments}}


class WordEncoder(TextEncoder):
    """Transformer over hashed words, learned with the prior; needs no vocabulary and no download.

    A word is the sum of `hashes` rows of one table, at hashes of the word. Two words have all hashes in common about
    once in buckets ** hashes pairs, so a small table suffices for any language. A few Transformer blocks over words and
    positions follow. Case is ignored; punctuation marks are words.

    Args:
        width: C, a multiple of `heads`.
        depth: blocks.
        heads: attention heads.
        max_words: K.
        buckets: rows of the table.
        hashes: rows a word.
        truncate: truncate long captions instead of raising an error.

    Raises:
        ValueError: a size that is not positive, or a width that is not a multiple of `heads`.
    """

    def __init__(
        self,
        *,
        width: int = 256,
        depth: int = 2,
        heads: int = 4,
        max_words: int = 48,
        buckets: int = 2048,
        hashes: int = 3,
        truncate: bool = False,
    ) -> None:
        super().__init__()
        sizes = {"width": width, "depth": depth, "heads": heads, "max_words": max_words}
        check_sizes(sizes | {"buckets": buckets, "hashes": hashes})
        self.width, self.depth, self.heads, self.max_words = width, depth, heads, max_words
        self.buckets, self.hashes, self.truncate = buckets, hashes, truncate
        self.shape = max_words, width
        self.embedding = nn.Embedding(buckets + 1, width)  # row 0: no word
        self.positions = nn.Parameter(torch.empty(max_words, width))
        self.blocks = nn.ModuleList(Block(width, heads, dropout=0.0) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.apply(initialize)
        # Words have variance 1, positions 1/4. With smaller values, what the blocks add to all positions dominates, and
        # the prior learns to ignore the text.
        nn.init.normal_(self.embedding.weight, std=hashes**-0.5)
        nn.init.normal_(self.positions, std=0.5)

    def tokenize(self, captions: Sequence[str]) -> Tensor:
        """Convert captions to ids (B, K, hashes) int64, 1 to `buckets`, and 0 after the last word."""
        check_captions(captions)
        ids = torch.zeros(len(captions), self.max_words, self.hashes, dtype=torch.int64)
        for row, caption in enumerate(captions):
            words = words_of(caption)
            if len(words) > self.max_words and not self.truncate:
                raise _too_long(caption, len(words), "words", self.max_words)
            hashes = [_hashes(word, self.hashes) for word in words[: self.max_words]]
            ids[row, : len(hashes)] = torch.tensor(hashes) % self.buckets + 1
        return ids

    def forward(self, ids: Tensor) -> TextFeatures:
        """Return features (B, K, C) and mask (B, K) of ids (B, K, hashes)."""
        x = self.embedding(ids).sum(2) + self.positions
        for block in self.blocks:
            x = block(x, attention)  # positions after the last word take part: they encode the length
        return TextFeatures(self.norm(x), ids[..., 0] > 0)


class PretrainedTextEncoder(TextEncoder):
    """A frozen text encoder of Hugging Face's transformers: CLIP, T5, BERT, or any model with a tokenizer.

    Its weights are not parameters and are not saved with the prior. Copies of the encoder share them, and they move
    with the encoder to other devices and types. Features are the last hidden states in float32, normalized to unit
    length as in VQ-Diffusion.

    Args:
        name: of a model on huggingface.co, which is downloaded once, or a local folder.
        max_tokens: K, tokens per caption; None: the tokenizer's limit, or 77 if it has none.
        truncate: truncate long captions instead of raising an error.

    Raises:
        FileNotFoundError: no such model, or no network to download it.
        ValueError: transformers is not installed, or `max_tokens` is not positive.
    """

    def __init__(self, name: str = CLIP, *, max_tokens: int | None = None, truncate: bool = False) -> None:
        super().__init__()
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
        self.name, self.truncate = name, truncate
        with weights_of_its_own():
            self._tokenizer, model = _load(name)
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        limit = self._tokenizer.model_max_length
        self.max_tokens = max_tokens or (limit if limit <= _MOST_TOKENS else _DEFAULT_TOKENS)
        self._frozen = _Shared(model.eval().requires_grad_(False))
        self.shape = self.max_tokens, model.config.hidden_size

    def tokenize(self, captions: Sequence[str]) -> Tensor:
        """Convert captions to (B, K, 2) int64: token ids, and 1 for text."""
        check_captions(captions)
        captions = list(captions)
        if not self.truncate:
            for caption, ids in zip(captions, self._tokenizer(captions)["input_ids"], strict=True):
                if len(ids) > self.max_tokens:
                    raise _too_long(caption, len(ids), "tokens", self.max_tokens)
        tokens = self._tokenizer(
            captions, padding="max_length", truncation=True, max_length=self.max_tokens, return_tensors="pt"
        )
        return torch.stack([tokens["input_ids"], tokens["attention_mask"]], dim=2)

    @torch.no_grad()
    def forward(self, ids: Tensor) -> TextFeatures:
        """Return features (B, K, C) and mask (B, K) of ids (B, K, 2)."""
        token_ids, mask = ids.unbind(2)
        hidden = self._frozen.model(input_ids=token_ids, attention_mask=mask).last_hidden_state
        return TextFeatures(F.normalize(hidden.float(), dim=2), mask.bool())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PretrainedTextEncoder:
        self._frozen.model._apply(fn)
        return super()._apply(fn, recurse)


class LabelEncoder(TextEncoder):
    """A learned row for each label.

    Args:
        names: of the labels by id; saved with the prior.
        width: C.

    Raises:
        ValueError: no names, or a width below 1.
    """

    condition = "label"
    truncate = False

    def __init__(self, names: Sequence[str], *, width: int = 256) -> None:
        super().__init__()
        if not names or width < 1:
            raise ValueError(f"a LabelEncoder needs names and a positive width, got {len(names)} names, width {width}")
        self.names, self.width, self.shape = tuple(names), width, (1, width)
        self.embedding = nn.Embedding(len(names), width)  # N(0, 1), as the words of WordEncoder

    def tokenize(self, captions: Sequence[str | int] | Tensor) -> Tensor:
        """Convert labels, as `label_ids`, to ids (B, 1, 1) int64."""
        return label_ids(captions, self.names, "the label")[:, None, None]

    def forward(self, ids: Tensor) -> TextFeatures:
        """Return features (B, 1, C) and an all-True mask (B, 1) of ids (B, 1, 1)."""
        ids = ids[..., 0]
        return TextFeatures(self.embedding(ids), torch.ones_like(ids, dtype=torch.bool))


def restore_text_encoder(description: Mapping[str, Any]) -> TextEncoder:
    """Return the encoder described by `TextEncoder.architecture`; learned encoders get new weights.

    Raises:
        ValueError: not such a description. Otherwise as the encoder's constructor.
    """
    kinds: list[type[TextEncoder]] = [WordEncoder, PretrainedTextEncoder, LabelEncoder]
    return restore("text encoder", {kind.__name__: kind for kind in kinds}, description)


def words_of(caption: str) -> list[str]:
    """Return the words of a caption in lower case; punctuation marks are words."""
    return _WORD.findall(caption.lower())


def check_captions(captions: Sequence[str]) -> None:
    """Raise TypeError unless captions are a sequence of str; ValueError if there are none, or one is empty."""
    if isinstance(captions, str) or not all(isinstance(caption, str) for caption in captions):
        kind = "a str" if isinstance(captions, str) else ", ".join(sorted({type(item).__name__ for item in captions}))
        raise TypeError(f"captions must be a list of str, got {kind}")
    if not captions:
        raise ValueError("there must be at least one caption, got none")
    for number, caption in enumerate(captions):
        if not caption.strip():
            raise ValueError(
                f"caption {number} is empty: give it words, or none at all for an image without a condition (text=None)"
            )


@functools.lru_cache(maxsize=1 << 16)
def _hashes(word: str, count: int) -> list[int]:
    """Return hashes of the word, the same on every machine."""
    salts = (i.to_bytes(2, "little") for i in range(count))
    digests = (hashlib.blake2b(word.encode(), digest_size=4, salt=salt).digest() for salt in salts)
    return [int.from_bytes(digest, "little") for digest in digests]


class _TransformersModel(Protocol):
    """Interface of a transformers model as this module uses it; transformers may not be installed."""

    config: Any

    def __call__(self, *, input_ids: Tensor, attention_mask: Tensor) -> Any: ...

    def _apply(self, fn: Callable[[Tensor], Tensor]) -> Any: ...


class _Shared:
    """Wrapper that excludes a model from its owner's parameters and deep copies."""

    def __init__(self, model: _TransformersModel) -> None:
        self.model = model

    def __deepcopy__(self, memo: dict) -> _Shared:
        return copy.copy(self)


def _too_long(caption: str, length: int, unit: str, limit: int) -> ValueError:
    start = caption if len(caption) <= 60 else f"{caption[:60]}..."
    return ValueError(
        f"the caption {start!r} has {length} {unit}, over the encoder's {limit}: shorten it (in Python, an encoder "
        "with truncate=True cuts it)"
    )


def _load(name: str) -> tuple[Any, Any]:
    """Return tokenizer and text encoder of a model."""
    try:
        import transformers
    except ImportError:
        raise ValueError(
            f"the text encoder {name!r} needs transformers: {install('text')}, or take "
            "WordEncoder, which learns with the prior (`regvq train diffusion --text-encoder words`)"
        ) from None
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        if config.model_type in ("clip", "clip_text_model"):
            return tokenizer, transformers.CLIPTextModel.from_pretrained(name)
        model = transformers.AutoModel.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise FileNotFoundError(
            f"no text encoder {name!r}, neither as a folder nor on huggingface.co: {reason}"
        ) from None
    return tokenizer, model.get_encoder() if config.is_encoder_decoder else model
