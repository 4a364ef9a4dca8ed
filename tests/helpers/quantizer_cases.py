"""Every quantizer at a small size, and latents for it: shared by tests of quantizers."""

import torch
from torch import Tensor

from regvq_fast.quantizers import (
    BSQQuantizer,
    EMAQuantizer,
    FSQQuantizer,
    GumbelQuantizer,
    IBQQuantizer,
    LFQQuantizer,
    NearestQuantizer,
    QuantizerOutput,
    RegularizedQuantizer,
    SimVQQuantizer,
)

N, D = 24, 8
BUILDERS = {
    "reg-vq": lambda: RegularizedQuantizer(N, D),
    "reg-vq-linear": lambda: RegularizedQuantizer(N, D, logits="linear"),
    "reg-vq-distance": lambda: RegularizedQuantizer(N, D, logits="distance"),
    "gumbel-vq": lambda: GumbelQuantizer(N, D),
    "vq-gan": lambda: NearestQuantizer(N, D),
    "vq-vae": lambda: EMAQuantizer(N, D),
    "fsq": lambda: FSQQuantizer(3 * 4**7, D, levels=(3, *[4] * 7)),
    "lfq": lambda: LFQQuantizer(2**D, D),
    "lfq-groups": lambda: LFQQuantizer(2**D, D, temperature=1.0, group_bits=3),
    "bsq": lambda: BSQQuantizer(2**D, D),
    "vq-gan-rotation": lambda: NearestQuantizer(N, D, rotation_trick=True),
    "vq-vae-kmeans": lambda: EMAQuantizer(N, D, kmeans_init=True),
    "simvq": lambda: SimVQQuantizer(N, D),
    "ibq": lambda: IBQQuantizer(N, D),
}


def maps(batch: int = 3, height: int = 4, width: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, D, height, width, generator=generator).to(memory_format=torch.channels_last)


def seed(value: int = 7) -> Tensor:
    return torch.tensor(value)


def equal(a: QuantizerOutput, b: QuantizerOutput) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True) if isinstance(x, Tensor))
