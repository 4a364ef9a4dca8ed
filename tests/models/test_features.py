"""The VGG feature networks, and the order in which their weights are looked for."""

import copy

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

from regvq_fast.models import features
from regvq_fast.models.features import RANDOM, NoWeightsError, VGGFeatures, load_vgg_features
from regvq_fast.models.weights import RemoteWeights, sha256_of

# torchvision's `features` indices of all convolutions and of the five outputs (its configurations D and E).
CONVS = {
    "vgg16": [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28],
    "vgg19": [0, 2, 5, 7, 10, 12, 14, 16, 19, 21, 23, 25, 28, 30, 32, 34],
}
TAPS = {"vgg16": [3, 8, 15, 22, 29], "vgg19": [3, 8, 15, 24, 33]}
POOLS = {"vgg16": [4, 9, 16, 23], "vgg19": [4, 9, 18, 27]}
SMALL = ("relu1_1", "relu1_2")


@pytest.fixture(scope="module", params=["vgg16", "vgg19"])
def network(request):
    return VGGFeatures(request.param)


@pytest.fixture(scope="module")
def images():
    return torch.rand(2, 3, 35, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture
def checkpoint():
    """A torchvision-like state dict for the SMALL layers, unlike the network's own initial weights."""
    generator = torch.Generator().manual_seed(1)
    state = VGGFeatures("vgg16", SMALL).state_dict()
    state = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in state.items()}
    return state | {"classifier.0.weight": torch.zeros(2, 2)}


@pytest.fixture(autouse=True)
def empty_cache(no_downloads):
    return no_downloads


# --- the network -----------------------------------------------------------------------------------------------------


def test_outputs_follow_the_architecture(network, images):
    """In double precision, but for the constants, so that sums rounded by another CPU stay within fp32's bounds."""
    network, images = copy.deepcopy(network).double(), images.double()
    weights = network.state_dict()
    used = [i for i in CONVS[network.net] if i < TAPS[network.net][-1]]
    assert list(weights) == [f"features.{i}.{kind}" for i in used for kind in ("weight", "bias")]

    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    h = ((images + 1) / 2 - mean[:, None, None]) / std[:, None, None]
    expected = []
    for i in range(TAPS[network.net][-1] + 1):
        if i in POOLS[network.net]:
            h = F.max_pool2d(h, 2)
        elif i in CONVS[network.net]:
            h = F.conv2d(h, weights[f"features.{i}.weight"], weights[f"features.{i}.bias"], padding=1)
        else:
            h = h.relu()
        if i in TAPS[network.net]:
            expected.append(h)
    assert network.channels == tuple(h.shape[1] for h in expected)
    torch.testing.assert_close(network(images), expected, rtol=1.3e-6, atol=1e-5)


def test_outputs_are_not_overwritten_by_later_layers(images):
    shallow = VGGFeatures("vgg16", ("relu1_1",))(images)
    torch.testing.assert_close(VGGFeatures("vgg16", SMALL)(images)[0], shallow[0], rtol=0, atol=0)


@pytest.mark.parametrize(("net", "last"), [("vgg16", "relu5_3"), ("vgg19", "relu5_4")])
def test_the_whole_trunk_has_torchvisions_names(net, last):
    assert list(VGGFeatures(net, (last,)).state_dict())[::2] == [f"features.{i}.weight" for i in CONVS[net]]


def test_stops_behind_the_last_layer_needed():
    assert len(VGGFeatures("vgg19", ("relu2_1", "relu3_2")).features) == 14


def test_frozen_but_differentiable(network, images):
    model = nn.Sequential(network).train()
    assert not any(module.training for module in network.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    images = images[:1].clone().requires_grad_()
    sum(h.sum() for h in network(images)).backward()
    assert images.grad.abs().sum() > 0


def test_random_weights_depend_on_the_seed_alone():
    state = torch.get_rng_state()
    first = VGGFeatures("vgg16", SMALL)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(1)
    again, other = VGGFeatures("vgg16", SMALL), VGGFeatures("vgg16", SMALL, seed=1)
    assert torch.equal(first.features[2].weight, again.features[2].weight)
    assert not torch.equal(first.features[2].weight, other.features[2].weight)
    assert (other.source, other.pretrained, other.imagenet) == ("random(seed 1)", False, False)
    assert other.label == "random VGG-16"


def test_random_activations_keep_their_scale(network, images):
    scales = [h.square().mean().sqrt().item() for h in network(images)]
    assert min(scales) > 0.3
    assert max(scales) < 3


def test_compiles_without_a_graph_break(images):
    network = VGGFeatures("vgg16", SMALL)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), network(images))


def test_smallest_images(network):
    assert [h.shape[-1] for h in network(torch.zeros(1, 3, 16, 16))] == [16, 8, 4, 2, 1]
    with pytest.raises(ValueError, match=r"15 x 16 .*relu5_3"):
        network(torch.zeros(1, 3, 15, 16))
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\).*\(1, 1, 16, 16\)"):
        network(torch.zeros(1, 1, 16, 16))


@pytest.mark.parametrize(
    ("net", "layers", "message"),
    [
        ("vgg11", SMALL, r"vgg16, vgg19.*'vgg11'"),
        ("vgg16", ("relu3_4",), r"relu1_1, .*relu3_4$"),
        ("vgg16", (), r"relu1_1, .*none$"),
        ("vgg16", ("relu2_1", "relu1_1"), r"relu2_1, relu1_1$"),
        ("vgg16", ("relu2_1", "relu2_1"), r"relu2_1, relu2_1$"),
    ],
)
def test_bad_configuration(net, layers, message):
    with pytest.raises(ValueError, match=message):
        VGGFeatures(net, layers)


# --- where the weights come from -------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_weights_from_a_path(tmp_path, checkpoint, suffix, dtype):
    path = tmp_path / f"my_vgg{suffix}"
    checkpoint = {name: tensor.to(dtype) for name, tensor in checkpoint.items()}
    save = safetensors.torch.save_file if suffix == ".safetensors" else torch.save
    save(checkpoint, path)
    network = load_vgg_features("vgg16", path, layers=SMALL)
    for name, tensor in network.state_dict().items():
        torch.testing.assert_close(tensor, checkpoint[name].float(), rtol=0, atol=0)
    assert (network.source, network.pretrained, network.imagenet) == (f"path:{path}", True, False)
    assert network.label == f"VGG-16 of my_vgg{suffix}"
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_a_path_to_torchvisions_own_file_is_recognised(tmp_path, checkpoint, monkeypatch):
    path = tmp_path / "renamed.pth"
    torch.save(checkpoint, path)
    remote = RemoteWeights("http://127.0.0.1:9/weights.pth", sha256_of(path)[:8])
    monkeypatch.setitem(features.IMAGENET_WEIGHTS, "vgg16", remote)
    network = load_vgg_features("vgg16", path, layers=SMALL)
    assert network.imagenet
    assert network.label == "ImageNet VGG-16"


def test_a_path_that_does_not_serve_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing\.pth"):
        load_vgg_features("vgg16", tmp_path / "missing.pth")
    path = tmp_path / "partial.pth"
    torch.save({"features.0.weight": torch.zeros(64, 1, 3, 3), "features.1.weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"partial\.pth: .*vgg16") as error:
        load_vgg_features("vgg16", path, layers=SMALL)
    assert str(error.value).splitlines()[1:] == [
        "  missing: features.0.bias",
        "  missing: features.2.weight",
        "  missing: features.2.bias",
        "  unexpected: features.1.weight",
        "  wrong shape: features.0.weight is (64, 1, 3, 3), should be (64, 3, 3, 3)",
    ]


def test_weights_of_the_other_network_are_told_apart(tmp_path, checkpoint):
    path = tmp_path / "vgg19.pth"
    torch.save(checkpoint | {"features.16.weight": torch.zeros(256, 256, 3, 3)}, path)  # a pooling layer of VGG-16
    assert load_vgg_features("vgg19", path, layers=SMALL).pretrained
    with pytest.raises(ValueError, match=r"features\.16\.weight"):
        load_vgg_features("vgg16", path, layers=SMALL)


def test_weights_from_the_cache(checkpoint, empty_cache):
    empty_cache.mkdir(parents=True)
    torch.save(checkpoint, empty_cache / "weights.pth")
    network = load_vgg_features("vgg16", layers=SMALL, download=False)
    assert torch.equal(network.features[2].weight, checkpoint["features.2.weight"])
    assert (network.source, network.imagenet) == (f"cache:{empty_cache / 'weights.pth'}", True)


@pytest.mark.parametrize(("download", "reason"), [(False, "downloads are disabled"), (True, "can't reach http")])
def test_absent_weights_are_an_error_and_random_ones_have_to_be_asked_for(download, reason):
    with pytest.raises(NoWeightsError, match=f"VGG-19.*{reason}"):
        load_vgg_features("vgg19", layers=SMALL, download=download)
    network = load_vgg_features("vgg19", RANDOM, layers=SMALL, download=download)
    assert (network.source, network.pretrained, network.label) == ("random(seed 0)", False, "random VGG-19")
