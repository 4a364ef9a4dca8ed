"""The fixture that tests of all quantizers share."""

import pytest
import torch
from helpers.quantizer_cases import BUILDERS

from regvq_fast.quantizers import Quantizer


@pytest.fixture(params=BUILDERS, ids=str)
def quantizer(request: pytest.FixtureRequest) -> Quantizer:
    torch.manual_seed(0)
    return BUILDERS[request.param]()
