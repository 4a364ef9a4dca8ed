"""A small token transformer and a batch for it: shared by its tests."""

from typing import get_args

import torch

from regvq_fast.priors.autoregressive import TokenTransformer
from regvq_fast.priors.autoregressive.model import Arch

CODES, CLASSES, WIDTH, DEPTH, HEADS = 12, 5, 16, 2, 2
CONDITION, TOKENS = 4, 6  # lengths
ARCHS = get_args(Arch)


def make_model(**options):
    torch.manual_seed(0)
    arguments = {"token_shape": (2, 3), "condition_shape": (1, 4), "width": WIDTH, "depth": DEPTH, "heads": HEADS}
    return TokenTransformer(CODES, CLASSES, **(arguments | options))


def randomized(model):
    """Weights so large that each of them matters."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model


def make_batch(images=3):
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(CODES, (images, 2, 3), generator=generator)
    return tokens, torch.randint(CLASSES + 1, (images, 1, 4), generator=generator)
