"""The llama block: literal formulas, and rotations by which a score depends on differences of positions alone."""

import functools
import itertools
import math

import pytest
import torch

from regvq_fast.models.attention import attention
from regvq_fast.models.llama import LlamaBlock, RMSNorm, RotarySelfAttention, SwiGLU, grid_rotation, rotate

CAUSAL = functools.partial(attention, causal=True)


def randomized(module: torch.nn.Module) -> torch.nn.Module:
    """Weights so large that each of them matters."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return module


def values(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def silu(x: torch.Tensor) -> torch.Tensor:
    return x / (1 + torch.exp(-x))


def normalized(x: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.double() for name, tensor in module.state_dict().items()}


def turned(x: torch.Tensor, row: float, column: float) -> torch.Tensor:
    """A vector (D,) by the definition: pairs (d, d + D/2) as complex numbers, times exp(i * angle)."""
    quarter = len(x) // 4
    angles = [position * 100.0 ** (-j / quarter) for position in (row, column) for j in range(quarter)]
    pairs = torch.complex(*x.double().chunk(2)) * torch.exp(1j * torch.tensor(angles, dtype=torch.float64))
    return torch.cat([pairs.real, pairs.imag])


def test_rms_norm_and_swiglu_are_their_formulas() -> None:
    x, norm, mlp = values(2, 5, 24), randomized(RMSNorm(24)), randomized(SwiGLU(24))
    expected = normalized(x.double()) * norm.weight.double()
    torch.testing.assert_close(norm(x).double(), expected, rtol=1e-6, atol=1e-6)
    gate, up = weights(mlp)["gate_up.weight"].chunk(2)
    expected = (silu(x.double() @ gate.T) * (x.double() @ up.T)) @ weights(mlp)["down.weight"].T
    torch.testing.assert_close(mlp(x).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("width", "hidden"), [(16, 64), (24, 64), (192, 512), (1024, 2752)])
def test_hidden_channels_are_eight_thirds_of_the_width(width: int, hidden: int) -> None:
    with torch.device("meta"):
        assert SwiGLU(width).down.weight.shape == (width, hidden)


def test_a_block_is_its_formula() -> None:
    condition, tokens, heads, width = (1, 2), (2, 2), 2, 16
    block, x = randomized(LlamaBlock(width, heads, 0.5)).eval(), values(3, 5, width)
    # Of a condition over the whole image; of the token that a position shows, and of the one that it predicts.
    cells = [(0, 0), (0, 1), (1, 0), (1, 1)]
    halves = [(0.5, 0), (0.5, 1)]
    keys, queries = halves + cells[:-1], halves[:-1] + cells
    w = {name: tensor.double() for name, tensor in block.state_dict().items()}
    h = normalized(x.double()) * w["ln1.weight"]
    query, key, value = (h @ w["attn.qkv.weight"].T).unflatten(2, (3, heads, -1)).unbind(2)
    query, key = (
        normalized(part) * gain for part, gain in zip((query, key), w["attn.qk_gain"].flatten(1), strict=True)
    )
    out = torch.zeros(3, 5, heads, width // heads, dtype=torch.float64)
    for image in range(3):
        for head in range(heads):
            for i, at in enumerate(queries):
                q = turned(query[image, i, head], *at)
                scores = torch.stack([q @ turned(key[image, j, head], *keys[j]) for j in range(i + 1)])
                out[image, i, head] = (scores / math.sqrt(width / heads)).softmax(0) @ value[image, : i + 1, head]
    y = x.double() + out.flatten(2) @ w["attn.proj.weight"].T
    h = normalized(y) * w["ln2.weight"]
    gate, up = w["mlp.gate_up.weight"].chunk(2)
    expected = y + (silu(h @ gate.T) * (h @ up.T)) @ w["mlp.down.weight"].T
    rotation = grid_rotation(condition, tokens, width // heads)
    torch.testing.assert_close(block(x, CAUSAL, rotation).double(), expected, rtol=1e-5, atol=1e-5)


def test_scores_depend_on_differences_of_positions_alone() -> None:
    """Between a token's query and the keys of map and tokens, across the ends of rows, too."""
    height, width, dim = 3, 5, 16
    rotation = grid_rotation((height, width), (height, width), dim)
    query, key = values(2, dim)
    same = torch.stack([query, key]).expand(1, rotation.shape[1], 2, dim)[:, :, :, None]
    queries, keys = rotate(same, rotation).flatten(3).squeeze(0).unbind(1)
    scores = queries @ keys.T
    cells = [divmod(i, width) for i in range(height * width)]
    shown, predicted = cells + cells[:-1], cells[:-1] + cells
    by_difference: dict[tuple[int, int], list[float]] = {}
    for (r, c), row in zip(predicted, scores.tolist(), strict=True):
        for (s, t), score in zip(shown, row, strict=True):
            by_difference.setdefault((r - s, c - t), []).append(score)
    assert len(by_difference) == (2 * height - 1) * (2 * width - 1)
    assert max(max(found) - min(found) for found in by_difference.values()) < 1e-4
    assert by_difference[0, 0][0] == pytest.approx(float(query @ key), abs=1e-4)
    firsts = sorted(found[0] for found in by_difference.values())
    assert min(b - a for a, b in itertools.pairwise(firsts)) > 1e-4  # no two differences are alike


def test_a_coarser_map_and_a_single_id_cover_the_image() -> None:
    def angles(condition: tuple[int, int]) -> torch.Tensor:
        """(K, 2) rows and columns of the condition's keys; with four channels a radian is a token."""
        rotation = grid_rotation(condition, (4, 2), 4)[0, : math.prod(condition), :, 1, 0]
        return torch.atan2(rotation[:, 1, 2:], rotation[:, 0, :2])

    torch.testing.assert_close(angles((1, 1)), torch.tensor([[1.5, 0.5]]))
    torch.testing.assert_close(angles((2, 1)), torch.tensor([[0.5, 0.5], [2.5, 0.5]]))


def test_lengths_of_queries_and_keys_do_not_matter_under_autocast() -> None:
    """They are normalized, so that scores stay bounded; attention gets one type for all three."""
    layer, x, seen = RotarySelfAttention(16, 2), values(1, 5, 16), []

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        seen.append((query, key, value))
        return CAUSAL(query, key, value)

    with torch.no_grad():
        layer.qkv.weight[:32] *= 1000
    with torch.autocast("cpu", torch.bfloat16):
        layer(x, attend, grid_rotation((1, 2), (2, 2), 8))
    query, key, value = seen[0]
    assert query.dtype == key.dtype == value.dtype == torch.bfloat16
    for part in (query, key):
        torch.testing.assert_close(part.float().square().mean(-1), torch.ones(1, 5, 2), rtol=0.02, atol=0)
