"""The patch discriminator: taming's names, patch geometry, initialisation, and what it refuses."""

import pytest
import torch

from regvq_fast.models.discriminator import PatchDiscriminator

# main.N of taming's NLayerDiscriminator(3, 64, 3): convolutions with their shapes, then the batch norms' widths.
TAMING_CONVS = {0: (64, 3), 2: (128, 64), 5: (256, 128), 8: (512, 256), 11: (1, 512)}
TAMING_NORMS = {3: 128, 6: 256, 9: 512}


def test_names_and_shapes_are_tamings():
    shapes = {f"main.{i}.weight": (*shape, 4, 4) for i, shape in TAMING_CONVS.items()}
    shapes |= {"main.0.bias": (64,), "main.11.bias": (1,)}
    for i, width in TAMING_NORMS.items():
        shapes |= {f"main.{i}.{name}": (width,) for name in ("weight", "bias", "running_mean", "running_var")}
        shapes[f"main.{i}.num_batches_tracked"] = ()
    ours = {name: tuple(tensor.shape) for name, tensor in PatchDiscriminator().state_dict().items()}
    assert ours == shapes


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
def test_convolutions_keep_their_names_and_have_a_bias_without_normalisation(norm):
    names = PatchDiscriminator(norm=norm).state_dict()
    assert {f"main.{i}.weight" for i in TAMING_CONVS} <= names.keys()
    assert [f"main.{i}.bias" in names for i in TAMING_CONVS] == [True, *[norm == "none"] * 3, True]
    assert [f"main.{i}.weight" in names for i in TAMING_NORMS] == [norm != "none"] * 3


def test_initialisation():
    torch.manual_seed(0)
    model = PatchDiscriminator()
    for i, module in enumerate(model.main):
        if i in TAMING_CONVS:
            assert module.weight.mean().abs() < 2e-3
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.05)
        if i in TAMING_NORMS:
            assert module.weight.mean().item() == pytest.approx(1.0, abs=0.01)
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.3)
            assert not module.bias.any()


@pytest.mark.parametrize("num_layers", [1, 2, 3, 5])
def test_patches(num_layers):
    model = PatchDiscriminator(filters=2, num_layers=num_layers, norm="group")
    smallest = model.min_size
    assert smallest == 3 * 2**num_layers
    assert model(torch.zeros(1, 3, smallest, smallest + 2**num_layers)).shape == (1, 1, 1, 2)
    with pytest.raises(ValueError, match=f"{smallest - 1} x {smallest} .*{num_layers} layers"):
        model(torch.zeros(1, 3, smallest - 1, smallest))


def test_a_patch_is_70_pixels_wide():
    model = PatchDiscriminator(filters=4, norm="none").double()
    images = torch.randn(1, 3, 128, 128, dtype=torch.float64, requires_grad=True)
    logits = model(images)
    assert logits.shape == (1, 1, 14, 14)
    (gradient,) = torch.autograd.grad(logits[0, 0, 7, 7], images)
    seen = gradient[0].abs().sum(0) > 0
    assert seen.any(0).sum() == 70
    assert seen.any(1).sum() == 70


def test_slope_and_order_of_the_layers():
    model = PatchDiscriminator(filters=4, num_layers=1).eval().double()
    images = torch.randn(2, 3, 8, 6, dtype=torch.float64)
    conv_in, _, conv, norm, _, conv_out = model.main

    def leaky(x):
        return torch.where(x > 0, x, 0.2 * x)

    expected = conv_out(leaky(norm(conv(leaky(conv_in(images))))))
    torch.testing.assert_close(model(images), expected)


def test_compiles_without_a_graph_break():
    model = PatchDiscriminator(filters=4, num_layers=1, norm="group")
    images = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(images), model(images))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"in_channels": 0}, r"in_channels .*\b0$"),
        ({"filters": 0}, r"filters .*\b0$"),
        ({"num_layers": 0}, r"num_layers .*\b0$"),
        ({"norm": "layer"}, r"norm .*'layer'$"),
    ],
)
def test_bad_configuration(arguments, message):
    with pytest.raises(ValueError, match=message):
        PatchDiscriminator(**arguments)


def test_bad_images():
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\).*\(1, 4, 32, 32\)"):
        PatchDiscriminator(filters=2)(torch.zeros(1, 4, 32, 32))
