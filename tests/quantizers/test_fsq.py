"""FSQ through vector-quantize-pytorch."""

import json
import math

import pytest
import torch
from torch import Tensor

from regvq_fast.quantizers import FSQQuantizer
from regvq_fast.quantizers.fsq import FSQSettings

library = pytest.importorskip("vector_quantize_pytorch")


def maps(code_dim: int) -> Tensor:
    return torch.randn(3, code_dim, 4, 5, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("levels", [(8, 6, 5), (7, 5, 5, 5, 5), (3,), (4, 4)])
def test_codes_and_gradients_are_those_of_the_library(levels: tuple[int, ...]) -> None:
    ours, theirs = FSQQuantizer(math.prod(levels), len(levels), levels=levels), library.FSQ(list(levels))
    z = (2 * maps(len(levels))).requires_grad_()
    out = ours(z)
    quantized, indices = theirs(z)
    assert torch.equal(out.quantized, quantized)
    assert torch.equal(out.indices, indices)
    assert out.loss == 0
    weight = torch.randn_like(z)
    found, expected = (torch.autograd.grad(value, z, weight) for value in (out.quantized, quantized))
    assert torch.equal(found[0], expected[0])
    assert found[0].abs().sum() > 0
    assert torch.equal(ours.codes_of(out.indices), theirs.indices_to_codes(indices))
    assert torch.equal(ours.logits(z).argmax(-1), out.indices)
    assert len(out.indices.unique()) > 1


def test_levels_are_digits_the_first_channel_lowest() -> None:
    quantizer = FSQQuantizer(15, 2, levels=(3, 5))
    out = quantizer(torch.tensor([[-9.0, 9.0], [0.1, -0.1], [9.0, 9.0], [-9.0, -9.0]]).T.view(1, 2, 4))
    assert out.indices.tolist() == [[0 + 4 * 3, 1 + 2 * 3, 2 + 4 * 3, 0]]
    expected = torch.tensor([[-1.0, 1.0], [0.0, 0.0], [1.0, 1.0], [-1.0, -1.0]]).T.view(1, 2, 4)
    torch.testing.assert_close(out.quantized, expected)


@pytest.mark.parametrize(
    ("asked", "levels"),
    [
        (256, (8, 6, 5)),
        (1024, (8, 5, 5, 5)),
        (1000, (8, 5, 5, 5)),
        (4096, (7, 5, 5, 5, 5)),
        (16384, (8, 8, 8, 6, 5)),
        (65536, (8, 8, 8, 5, 5, 5)),
    ],
)
def test_without_levels_they_are_the_papers(asked: int, levels: tuple[int, ...]) -> None:
    sizes = FSQSettings().sizes(asked, 32)
    assert sizes == (math.prod(levels), len(levels))
    quantizer = FSQQuantizer(*sizes)
    assert quantizer.settings.levels == levels
    assert quantizer.codes().shape == sizes


def test_a_description_in_json_builds_it_again() -> None:
    quantizer = FSQQuantizer(60, 3, levels=(5, 4, 3))
    again = FSQQuantizer(**json.loads(json.dumps(quantizer.arguments())))
    assert again.arguments() == quantizer.arguments()
    assert torch.equal(again(maps(3)).indices, quantizer(maps(3)).indices)


@pytest.mark.parametrize(
    ("sizes", "levels", "message"),
    [
        ((512, 9), (), "512: .*--levels.* 256, 1024, 4096, 16384 or 65536 codes$"),
        ((1024, 4), (), "num_codes=1000, code_dim=4 .*1024 and 4$"),
        ((16, 2), (8, 2), "at least 3 .*8 2$"),
        ((10**9, 3), (1000, 1000, 1000), "at most 1048576, got 1000 1000 1000$"),
    ],
)
def test_sizes_and_levels_that_do_not_fit_are_refused(sizes, levels, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FSQQuantizer(*sizes, levels=levels)


def test_without_the_library_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regvq_fast.quantizers.fsq.find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"vector-quantize-pytorch: pip install .*baselines"):
        FSQQuantizer(240, 3)


def test_latents_that_are_not_finite_are_refused() -> None:
    with pytest.raises(FloatingPointError, match="non-finite"):
        FSQQuantizer(240, 3)(maps(3) * math.inf)
