"""The perceptual distance: LPIPS to the letter where it may be called so, a named stand-in everywhere else."""

from types import SimpleNamespace

import pytest
import torch
import torchmetrics.functional.image.lpips as torchmetrics_lpips

from regvq_fast.losses import perceptual
from regvq_fast.losses.perceptual import LPIPS, LPIPS_LAYERS
from regvq_fast.models.features import VGGFeatures

WIDTHS = (64, 128, 256, 512, 512)


def network(net="vgg16", layers=LPIPS_LAYERS, imagenet=True):
    channels = tuple(WIDTHS[int(layer[4]) - 1] for layer in layers)
    return SimpleNamespace(net=net, layers=layers, channels=channels, imagenet=imagenet, label="some network")


def features(seed, channels=WIDTHS, batch=2):
    generator = torch.Generator().manual_seed(seed)
    sizes = [2 ** (4 - k) + 1 for k in range(len(channels))]
    return [torch.randn(batch, c, s, s + 1, generator=generator).relu() for c, s in zip(channels, sizes, strict=True)]


def test_equals_torchmetrics(monkeypatch):
    trunk = VGGFeatures("vgg16")
    monkeypatch.setattr(torchmetrics_lpips, "_get_tv_model_features", lambda net, pretrained: trunk.features)
    reference = torchmetrics_lpips._LPIPS(net="vgg", pnet_rand=True)
    x, y = torch.rand(2, 3, 3, 32, 40, generator=torch.Generator().manual_seed(0)) * 2 - 1
    trunk.imagenet = True  # as if they were torchvision's weights
    loss = LPIPS(trunk)
    assert (loss.name, loss.calibrated) == ("LPIPS", True)
    torch.testing.assert_close(loss(trunk(x), trunk(y)), reference(x, y).flatten(), rtol=1e-5, atol=1e-7)


def test_formula():
    loss = LPIPS(network())
    heads = loss.state_dict()
    assert list(heads) == [f"lin{k}.model.1.weight" for k in range(5)]
    x, y = features(0), features(1)
    expected = torch.zeros(2, dtype=torch.float64)
    for k in range(5):
        a, b = x[k].double(), y[k].double()
        difference = a / (a.square().sum(1, keepdim=True).sqrt() + 1e-10)
        difference -= b / (b.square().sum(1, keepdim=True).sqrt() + 1e-10)
        weight = heads[f"lin{k}.model.1.weight"].double()
        assert weight.shape == (1, WIDTHS[k], 1, 1)
        expected += (weight * difference.square()).sum(1).mean((1, 2))
    torch.testing.assert_close(loss(x, y), expected.float())


@pytest.mark.parametrize(
    ("trunk", "calibrated"),
    [
        (network(), True),
        (network(imagenet=False), False),
        (network(net="vgg19"), False),
        (network(layers=LPIPS_LAYERS[:4]), False),
    ],
)
def test_only_the_network_of_the_heads_is_called_lpips(trunk, calibrated):
    loss = LPIPS(trunk)
    assert loss.calibrated is calibrated
    assert loss.name == ("LPIPS" if calibrated else "perceptual distance (some network)")
    assert (torch.unique(loss.lin0.model[1].weight).numel() > 1) is calibrated


def test_random_network_is_named():
    assert LPIPS(VGGFeatures("vgg19", ("relu1_1",))).name == "perceptual distance (random VGG-19)"


def test_without_heads_it_warns_and_is_not_called_lpips(monkeypatch, tmp_path):
    origin = str(tmp_path / "__init__.py")
    monkeypatch.setattr(perceptual, "find_spec", lambda name: SimpleNamespace(origin=origin))
    with pytest.warns(UserWarning, match="no LPIPS heads"):
        loss = LPIPS(network())
    assert not loss.calibrated
    assert loss.name == "perceptual distance (some network)"


def test_uniform_heads_measure_one_minus_the_cosine():
    loss = LPIPS(network(imagenet=False))
    x, y = features(0), features(1)
    cosines = [torch.cosine_similarity(a, b, dim=1).mean((1, 2)) for a, b in zip(x, y, strict=True)]
    torch.testing.assert_close(loss(x, y), 1 - torch.stack(cosines).mean(0))
    orthogonal = [torch.zeros(1, c, 2, 2) for c in WIDTHS], [torch.zeros(1, c, 2, 2) for c in WIDTHS]
    for maps, channel in zip(orthogonal, (0, 1), strict=True):
        for h in maps:
            h[:, channel] = 3.0
    assert loss(*orthogonal).item() == pytest.approx(1.0)


def test_identity_symmetry_and_scale():
    loss = LPIPS(network())
    x, y = features(0), features(1)
    assert not loss(x, x).any()
    torch.testing.assert_close(loss(x, y), loss(y, x))
    torch.testing.assert_close(loss([2 * h for h in x], y), loss(x, y))


def test_no_dropout_and_no_training():
    loss = LPIPS(network()).train()
    x, y = features(0), features(1)
    assert torch.equal(loss(x, y), loss(x, y))
    assert not any(parameter.requires_grad for parameter in loss.parameters())


def test_gradients_are_finite_where_all_channels_are_dead():
    loss = LPIPS(network())
    x, y = features(0), features(1)
    for h in x:
        h[:, :, 0] = 0
        h.requires_grad_()
    loss(x, y).sum().backward()
    assert all(h.grad.isfinite().all() and h.grad.any() for h in x)


def test_computes_in_float32():
    loss = LPIPS(network())
    x, y = ([h.bfloat16() for h in features(seed)] for seed in (0, 1))
    with torch.autocast("cpu", torch.bfloat16):
        distance = loss(x, y)
    assert distance.dtype == torch.float32
    torch.testing.assert_close(distance, loss([h.float() for h in x], [h.float() for h in y]))


def test_compiles_without_a_graph_break():
    loss = LPIPS(network())
    x, y = features(0), features(1)
    torch.testing.assert_close(torch.compile(loss, fullgraph=True, backend="aot_eager")(x, y), loss(x, y))


def test_bad_features():
    loss = LPIPS(network())
    x = features(0)
    with pytest.raises(ValueError, match=r"\b5 .*5 and 4"):
        loss(x, x[1:])
    with pytest.raises(ValueError, match=r"feature maps 2 .*\(2, 256, 5, 6\).*\(2, 256, 4"):
        loss(x, [*x[:2], x[2][:, :, 1:], *x[3:]])
