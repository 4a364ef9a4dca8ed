import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from regvq_fast.losses import ProbabilisticContrastiveLoss, ReconstructionLoss
from regvq_fast.ops.reference import weighted_info_nce_reference

SEED = torch.tensor(4)


def feature_maps(seed: int, sizes: tuple[int, ...] = (8, 4)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 6, s, s, generator=generator, dtype=torch.float64).float() for s in sizes]


def rows(x: Tensor) -> Tensor:
    return F.normalize(x.flatten(2).mT, dim=2)


def test_dense_loss_is_equation_3_averaged_over_layers_images_and_positions() -> None:
    original, reconstruction = feature_maps(0), feature_maps(1)
    perturbation = torch.rand(2, 2, 2)
    loss = ProbabilisticContrastiveLoss(num_patches=None)(original, reconstruction, perturbation, SEED)
    expected = []
    for x, z in zip(original, reconstruction, strict=True):
        weight = perturbation.repeat_interleave(x.shape[2] // 2, 1).repeat_interleave(x.shape[3] // 2, 2).flatten(1)
        weight = weight / weight.sum(1, keepdim=True)
        expected.append(weighted_info_nce_reference(rows(x), rows(z), weight).mean())
    torch.testing.assert_close(loss, torch.stack(expected).mean())


def test_unweighted_loss_is_vanilla_contrastive_learning_whatever_the_perturbation() -> None:
    original, reconstruction = feature_maps(0, (4,)), feature_maps(1, (4,))
    module = ProbabilisticContrastiveLoss(weighted=False, num_patches=None)
    expected = weighted_info_nce_reference(rows(original[0]), rows(reconstruction[0])).mean()
    for perturbation in (torch.zeros(2, 2, 2), torch.rand(2, 2, 2)):
        torch.testing.assert_close(module(original, reconstruction, perturbation, SEED), expected)


def test_sampled_positions_are_the_same_in_both_images_and_drawn_once() -> None:
    # Features that tell their position: the loss of identical maps is small only if the positions agree.
    position = torch.eye(64).view(1, 64, 8, 8).expand(2, -1, -1, -1).contiguous()
    module = ProbabilisticContrastiveLoss(weighted=False, num_patches=32)
    assert float(module([position], [position], torch.zeros(2, 2, 2), SEED)) < 1e-4
    assert float(module([position], [position.flip(2)], torch.zeros(2, 2, 2), SEED)) > 1


def test_sampled_positions_depend_on_the_seed_alone() -> None:
    original, reconstruction = feature_maps(0, (16,)), feature_maps(1, (16,))
    perturbation = torch.rand(2, 4, 4)
    sampled = ProbabilisticContrastiveLoss(num_patches=64)
    losses = torch.stack([sampled(original, reconstruction, perturbation, torch.tensor(s)) for s in range(20)])
    again = sampled(original, reconstruction, perturbation, torch.tensor(0))
    assert torch.equal(again, losses[0])
    assert len(losses.unique()) == 20


def test_an_images_positions_do_not_depend_on_the_batch_it_comes_in() -> None:
    original, reconstruction, perturbation = feature_maps(0), feature_maps(1), torch.rand(2, 2, 2)
    module = ProbabilisticContrastiveLoss(num_patches=8)
    whole = module(original, reconstruction, perturbation, SEED)
    parts = [
        module(
            [x[i : i + 1] for x in original], [z[i : i + 1] for z in reconstruction], perturbation[i : i + 1], SEED, i
        )
        for i in (0, 1)
    ]
    torch.testing.assert_close(whole, torch.stack(parts).mean())


def test_without_perturbation_the_gradient_is_that_of_vanilla_contrastive_learning() -> None:
    original, perturbation = feature_maps(0), torch.zeros(2, 2, 2)
    gradients = []
    for weighted in (True, False):
        z = [m.requires_grad_() for m in feature_maps(1)]
        module = ProbabilisticContrastiveLoss(weighted=weighted, num_patches=8)
        gradients.append(torch.autograd.grad(module(original, z, perturbation, SEED), z))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_only_the_reconstruction_gets_a_gradient_and_it_is_finite_without_perturbation() -> None:
    original = [x.requires_grad_() for x in feature_maps(0)]
    reconstruction = [z.requires_grad_() for z in feature_maps(1)]
    loss = ProbabilisticContrastiveLoss(num_patches=8)(original, reconstruction, torch.zeros(2, 2, 2), SEED)
    loss.backward()
    assert torch.isfinite(loss)
    assert all(x.grad is None for x in original)
    assert all(z.grad is not None and torch.isfinite(z.grad).all() and z.grad.abs().sum() > 0 for z in reconstruction)


def test_dense_loss_of_a_large_map_takes_a_strided_sub_grid_that_every_seed_shifts() -> None:
    original, reconstruction = feature_maps(0, (9,)), feature_maps(1, (9,))
    module = ProbabilisticContrastiveLoss(weighted=False, num_patches=None, max_positions=20)  # of 81: every third
    shifts = {}
    for y in range(3):
        for x in range(3):
            part = slice(None), slice(None), slice(y, None, 3), slice(x, None, 3)
            loss = weighted_info_nce_reference(rows(original[0][part]), rows(reconstruction[0][part])).mean()
            shifts[round(float(loss), 5)] = (y, x)
    losses = [
        round(float(module(original, reconstruction, torch.zeros(2, 3, 3), torch.tensor(s))), 5) for s in range(60)
    ]
    assert {shifts[loss] for loss in losses} == set(shifts.values())


@pytest.mark.parametrize("max_positions", [2, 3, 4, 8])
@pytest.mark.parametrize(("height", "width"), [(1, 100), (2, 50), (100, 1), (50, 3), (3, 3), (5, 5), (7, 7)])
def test_a_sub_grid_has_at_least_two_positions_and_no_more_than_allowed(
    height: int, width: int, max_positions: int
) -> None:
    module = ProbabilisticContrastiveLoss(num_patches=None, max_positions=max_positions)
    reached = set()
    for value in range(40):
        positions = module._positions(0, torch.zeros(2, 1, height, width), None, torch.tensor(value), 0)
        assert positions is not None
        assert 2 <= positions.shape[1] == len(positions[0].unique()) <= max_positions
        assert 0 <= int(positions.min()) <= int(positions.max()) < height * width
        reached.update(positions[0].tolist())
    assert height * width > 9 or len(reached) == height * width


def test_masked_region_is_equation_3_of_the_masked_positions_among_all_negatives() -> None:
    original, reconstruction = feature_maps(0, (4,)), feature_maps(1, (4,))
    perturbation, mask = torch.rand(2, 4, 4), torch.rand(2, 4, 4) < 0.5
    for weighted in (True, False):
        module = ProbabilisticContrastiveLoss(weighted=weighted, num_patches=None, region="masked")
        loss = module(original, reconstruction, perturbation, SEED, mask=mask)
        counted = mask.flatten(1)
        weight = perturbation.flatten(1) * counted
        weight = weight / weight.sum(1, keepdim=True) * counted.float().mean(1, keepdim=True)
        arguments = (rows(original[0]), rows(reconstruction[0]), weight.clamp(min=1e-30) if weighted else None)
        expected = weighted_info_nce_reference(*arguments)[counted].mean()
        torch.testing.assert_close(loss, expected)


def test_masked_region_without_masked_positions_is_0_and_with_all_masked_the_whole() -> None:
    original, perturbation = feature_maps(0), torch.rand(2, 2, 2)
    reconstruction = [z.requires_grad_() for z in feature_maps(1)]
    module = ProbabilisticContrastiveLoss(num_patches=8, region="masked")
    nothing = module(original, reconstruction, perturbation, SEED, mask=torch.zeros(2, 2, 2, dtype=torch.bool))
    assert nothing.item() == 0
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(nothing, reconstruction))
    everything = module(original, reconstruction, perturbation, SEED, mask=torch.ones(2, 2, 2, dtype=torch.bool))
    whole = ProbabilisticContrastiveLoss(num_patches=8)(original, reconstruction, perturbation, SEED)
    torch.testing.assert_close(everything, whole)


def test_sampled_positions_of_the_masked_region_are_masked_ones_first() -> None:
    mask = torch.zeros(2, 4, 4, dtype=torch.bool)
    mask[:, :2] = True
    module = ProbabilisticContrastiveLoss(num_patches=8, region="masked")
    positions = module._positions(0, torch.zeros(2, 1, 4, 4), mask.float().flatten(1), SEED, 0)
    assert positions is not None
    assert [sorted(row) for row in positions.tolist()] == [list(range(8))] * 2


def test_layers_are_averaged_by_their_weights() -> None:
    original, reconstruction, perturbation = feature_maps(0), feature_maps(1), torch.rand(2, 2, 2)

    def loss(weights: tuple[float, ...] | None) -> Tensor:
        module = ProbabilisticContrastiveLoss(num_patches=None, layer_weights=weights)
        return module(original, reconstruction, perturbation, SEED)

    first, second = loss((1, 0)), loss((0, 2))
    torch.testing.assert_close(loss((1, 3)), (first + 3 * second) / 4)
    torch.testing.assert_close(loss(None), (first + second) / 2)


def test_calls_that_do_not_fit_the_settings_are_refused() -> None:
    maps, perturbation = feature_maps(0), torch.rand(2, 2, 2)
    with pytest.raises(ValueError, match="mask"):
        ProbabilisticContrastiveLoss(region="masked")(maps, maps, perturbation, SEED)
    with pytest.raises(ValueError, match=r"3 .*\b2 feature maps"):
        ProbabilisticContrastiveLoss(layer_weights=(1, 1, 1))(maps, maps, perturbation, SEED)
    for empty in ([], [torch.zeros(0, 6, 4, 4)]):
        with pytest.raises(ValueError, match="feature maps must not be"):
            ProbabilisticContrastiveLoss()(empty, empty, perturbation[:0], SEED)
    larger = feature_maps(0, (8, 5))
    for other in (larger, maps[:1]):
        with pytest.raises(ValueError, match=r"\(2, 6, 4, 4\).*\(2, 6, 8, 8\)"):
            ProbabilisticContrastiveLoss(num_patches=8)(maps, other, perturbation, SEED)
    with pytest.raises(ValueError, match=r"perturbation .*\(3, 2, 2\)"):
        ProbabilisticContrastiveLoss(num_patches=8)(maps, maps, torch.rand(3, 2, 2), SEED)
    with pytest.raises(ValueError, match=r"mask .*\(2, 4\)"):
        ProbabilisticContrastiveLoss(region="masked")(maps, maps, perturbation, SEED, mask=torch.ones(2, 4) > 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_patches": 1}, "num_patches"),
        ({"max_positions": 1}, "max_positions"),
        ({"tau": 0.0}, "got 0"),
        ({"region": "sky"}, r"region .*'sky'"),
        ({"layer_weights": (1.0, -1.0)}, "negative"),
        ({"layer_weights": (0.0, 0.0)}, "nor all 0"),
        ({"layer_weights": (1.0, float("nan"))}, r"negative.*nan"),
    ],
)
def test_bad_settings_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ProbabilisticContrastiveLoss(**arguments)


class _Features(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, images: Tensor) -> list[Tensor]:
        self.calls += 1
        return [images, F.avg_pool2d(images, 2)]


def test_reconstruction_loss_sums_its_weighted_terms_and_skips_those_of_weight_0() -> None:
    class Distance(torch.nn.Module):
        def forward(self, x: list[Tensor], y: list[Tensor]) -> Tensor:
            return (x[0] - y[0]).square().mean((1, 2, 3))

    x, y = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8)
    arguments = (x, y, torch.rand(2, 2, 2), SEED)
    shared, own = _Features(), _Features()
    contrastive = ProbabilisticContrastiveLoss()
    full = ReconstructionLoss(shared, Distance(), contrastive, l1_weight=2, perceptual_weight=3, contrastive_weight=5)
    loss, terms = full(*arguments)
    torch.testing.assert_close(loss, 2 * terms["l1"] + 3 * terms["perceptual"] + 5 * terms["contrastive"])
    torch.testing.assert_close(terms["l1"], (x - y).abs().mean())
    assert shared.calls == 2

    with_own = ReconstructionLoss(shared, Distance(), contrastive, own)
    assert set(with_own(*arguments)[1]) == {"l1", "perceptual", "contrastive"}
    assert (shared.calls, own.calls) == (4, 2)
    pixels = ReconstructionLoss(shared, Distance(), contrastive, perceptual_weight=0, contrastive_weight=0)
    assert set(pixels(*arguments)[1]) == {"l1"}
    assert shared.calls == 4


def test_reconstruction_loss_of_weights_0_is_0_whatever_the_pixels() -> None:
    weights = {"l1_weight": 0, "perceptual_weight": 0, "contrastive_weight": 0}
    reconstruction = torch.full((2, 3, 8, 8), torch.inf, requires_grad=True)
    nothing = ReconstructionLoss(_Features(), _Features(), None, **weights)
    loss, terms = nothing(torch.zeros(2, 3, 8, 8), reconstruction, torch.rand(2, 2, 2), SEED)
    (gradient,) = torch.autograd.grad(loss, reconstruction)
    assert loss.item() == gradient.abs().max().item() == 0
    assert terms["l1"].item() == torch.inf
