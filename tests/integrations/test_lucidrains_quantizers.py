"""vector-quantize-pytorch's VectorQuantize, before and after."""

import copy

import pytest
import torch
from helpers.same_steps import assert_same_steps, largest_tensor

from regvq_fast.integrations import swap_quantizers

library = pytest.importorskip("vector_quantize_pytorch")

WIDTH, CODES = 8, 32
LEARNS = {"learnable_codebook": True, "ema_update": False}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def build(**options):
    return library.VectorQuantize(WIDTH, CODES, **options)


def test_releases_with_other_arguments_are_left_alone(monkeypatch):
    quantizer = build()
    monkeypatch.setattr(library.VectorQuantize, "forward", lambda self, x, mask=None, indices=None: None)
    message = r"its forward takes \(x, mask, indices\), not the \(x, indices, \.\.\.\) of the releases that are known"
    with pytest.raises(ValueError, match=message):
        swap_quantizers(quantizer)


def rows():
    return torch.randn(2, 40, WIDTH)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rotation_trick": False},
        {"threshold_ema_dead_code": 2},
        {"manual_ema_update": True},
        {"freeze_codebook": True},
        {"kmeans_init": True},
        LEARNS,
        LEARNS | {"rotation_trick": False, "sync_update_v": 0.5},
        LEARNS | {"in_place_codebook_optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.1)},
        {"directional_reparam": True, "threshold_ema_dead_code": 2},
        {"orthogonal_reg_weight": 0.1, "ema_update": False},
        {"use_cosine_sim": True},
        {"use_cosine_sim": True, "threshold_ema_dead_code": 2, "kmeans_init": True},
        {"codebook_dim": 4, "layernorm_after_project_in": True},
        {"codebook_dim": 4, "heads": 2},
        {"codebook_dim": 4, "heads": 2, "separate_codebook_per_head": True, "threshold_ema_dead_code": 2},
    ],
    ids=lambda options: "+".join(options),
)
def test_options(options, training):
    assert_same_steps(build(**options).train(training), rows())


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({"accept_image_fmap": True}, (2, WIDTH, 4, 5)),
        ({"accept_3d_fmap": True}, (2, WIDTH, 2, 3, 4)),
        ({"channel_last": False}, (2, WIDTH, 20)),
        ({}, (20, WIDTH)),
    ],
)
def test_shapes(options, shape):
    assert_same_steps(build(**options), torch.randn(shape))


@pytest.mark.parametrize(
    "arguments",
    [
        {"mask": torch.arange(80).view(2, 40) % 3 > 0},
        {"lens": torch.tensor([7, 40])},
        {"freeze_codebook": True},
        {"return_loss_breakdown": True},
        {"ema_update_weight": torch.linspace(0, 1, CODES)},
        {"ema_update_weight": lambda sums, sizes: (sizes > 1).float()},
        {"accum_ema_update": True},
        {"ema_update": False},
        # Those that the library's own code answers:
        {"indices": torch.arange(80).view(2, 40) % CODES},
        {"topk": 3},
        {"codebook_transform_fn": lambda codes: codes[:, None, None].expand(-1, 2, 40, -1, -1) * 2},
    ],
    ids=lambda arguments: "+".join(arguments),
)
def test_arguments_of_a_call(arguments):
    assert_same_steps(build(), rows(), **arguments)


def test_masked_heads():
    mask = torch.arange(80).view(2, 40) % 3 > 0
    assert_same_steps(build(codebook_dim=4, heads=2, commitment_weight=0), rows(), mask=mask)


def test_updates_by_indices_from_outside():
    quantizer, batch, indices = build(), rows(), torch.arange(80).view(2, 40) % CODES
    accelerated = copy.deepcopy(quantizer)
    swap_quantizers(accelerated)
    for module in (quantizer, accelerated):
        module.update_indices(batch, indices)
    torch.testing.assert_close(accelerated.state_dict(), quantizer.state_dict())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"shared_codebook": True, "threshold_ema_dead_code": 2},
        {"quantize_dropout": True},
        {"use_cosine_sim": True},
        {"implicit_neural_codebook": True},
        {"beam_size": 2},
    ],
    ids=lambda options: "+".join(options),
)
def test_residual_quantizers(options, training):
    quantizer = library.ResidualVQ(dim=WIDTH, codebook_size=CODES, num_quantizers=3, **options)
    batch = rows()
    accelerated = copy.deepcopy(quantizer)
    assert list(swap_quantizers(accelerated).swapped) == ["layers.0", "layers.1", "layers.2"]
    for _ in range(2):
        outputs, ours = (
            (torch.manual_seed(0), module.train(training)(batch))[1] for module in (quantizer, accelerated)
        )
        torch.testing.assert_close(ours, outputs)
    torch.testing.assert_close(accelerated.state_dict(), quantizer.state_dict())


def test_grouped_residual_quantizers():
    quantizer = library.GroupedResidualVQ(dim=WIDTH, codebook_size=CODES, num_quantizers=2, groups=2)
    batch, accelerated = rows(), copy.deepcopy(quantizer)
    assert len(swap_quantizers(accelerated).swapped) == 4
    for training in (True, False):
        outputs, ours = (module.train(training)(batch) for module in (quantizer, accelerated))
        torch.testing.assert_close(ours, outputs)


@pytest.mark.parametrize(
    "options",
    [
        {"stochastic_sample_codes": True},
        {"straight_through": True, "rotation_trick": False},
        {"commitment_use_cross_entropy_loss": True},
        {"codebook_diversity_loss_weight": 1.0},
        {"affine_param": True},
        LEARNS | {"vq_bridge": torch.nn.Identity()},
    ],
    ids=lambda options: "+".join(options),
)
def test_options_that_are_not_covered(options):
    quantizer = build(**options)
    model = torch.nn.ModuleList([quantizer, build()])
    classes = [type(module) for module in quantizer.modules()]
    report = swap_quantizers(model)
    assert list(report.swapped) == ["1"]
    assert any(option in report.left_alone["0"] for option in options)
    assert [type(module) for module in quantizer.modules()] == classes
    with pytest.raises(ValueError, match="isn't covered"):
        swap_quantizers(quantizer)


@pytest.mark.parametrize("options", [{}, LEARNS, {"use_cosine_sim": True}])
@pytest.mark.parametrize("training", [True, False])
def test_nothing_is_as_large_as_the_distances(options, training):
    quantizer, batch = library.VectorQuantize(WIDTH, 256, **options).train(training), torch.randn(2, 128, WIDTH)
    assert largest_tensor(quantizer, batch) >= 256 * 256
    swap_quantizers(quantizer)
    assert largest_tensor(quantizer, batch) < 256 * 256 / 8
