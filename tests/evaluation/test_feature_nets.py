"""Networks behind the metrics: their names, features, weights and precision, and what they refuse."""

import pickle
import sys
import types
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from helpers.tiny_models import TinyNet, noise_images
from torch import Tensor, nn

from regvq_fast.data.transforms import to_float
from regvq_fast.evaluation import feature_nets, fid
from regvq_fast.evaluation.feature_nets import NoFeaturesError, PerceptualDistance, VGGFeatureNet, load_feature_net
from regvq_fast.evaluation.fid import FeatureStatistics
from regvq_fast.models.features import VGGFeatures
from regvq_fast.models.weights import RemoteWeights


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "mine.safetensors"
    trunk = VGGFeatures("vgg16", seed=7)
    safetensors.torch.save_file({name: value.half() for name, value in trunk.state_dict().items()}, path)
    return path


def test_vgg_features_are_named_after_their_weights(weights: Path) -> None:
    net, random = load_feature_net(f"vgg16:{weights}"), load_feature_net("random-vgg16")
    assert net.name == "VGG-16 of mine.safetensors, relu5_3 averaged"
    assert random.name == "random VGG-16, relu5_3 averaged"
    assert not net.standard
    assert len(net.hash) == 12
    assert net.hash != random.hash
    assert random.hash == VGGFeatureNet(VGGFeatures("vgg16", ("relu5_3",))).hash

    images = noise_images(3, seed=0, size=16)
    found = net(images)
    assert (found.shape, found.dtype, found.requires_grad) == ((3, 512), torch.float32, False)
    scaled = (images / 255 - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([0.229, 0.224, 0.225])[
        :, None, None
    ]
    state = safetensors.torch.load_file(weights)
    for block in ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28)):
        scaled = scaled if block[0] == 0 else torch.max_pool2d(scaled, 2)
        for k in block:
            kernel, bias = (state[f"features.{k}.{kind}"].float() for kind in ("weight", "bias"))
            scaled = torch.conv2d(scaled, kernel, bias, padding=1).relu()
    torch.testing.assert_close(found, scaled.mean(dim=(2, 3)), rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(net.train()(images), found)
    torch.testing.assert_close(net(images[1:2]), found[1:2], rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("no_downloads")
@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("resnet", ValueError, "--fid-features resnet .*inception:PATH, vgg16"),
        ("vgg16:", ValueError, "--fid-features vgg16: "),
        ("random-vgg16:x.pth", ValueError, r"random-vgg16:x\.pth"),
        ("vgg16:nowhere.pth", FileNotFoundError, r"nowhere\.pth"),
        ("vgg16", OSError, "VGG-16 .*--fid-features vgg16:PATH"),
    ],
)
def test_features_that_are_not_to_be_had(spec: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load_feature_net(spec)


def test_images_that_a_network_cannot_take() -> None:
    net = TinyNet()
    with pytest.raises(TypeError, match=r"uint8 .*torch\.float32"):
        net(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\).*\(3, 8, 8\)"):
        net(noise_images(1, 0)[0])
    with pytest.raises(ValueError, match=r"tiny .*\b4 .*8 x 3"):
        net(noise_images(1, 0)[..., :3])


class Extractor(nn.Module):
    """torch-fidelity's: takes a path, and reads it for itself."""

    def __init__(self, name: str, features_list: list[str], path: str) -> None:
        super().__init__()
        assert features_list == ["2048"]
        self.scale = nn.Parameter(torch.zeros(2048))
        self.Mixed_6d = nn.ModuleDict({"branch1x1": nn.Identity()})
        self.Mixed_6d.branch1x1 = self.Mixed_6d["branch1x1"]
        self.fc = types.SimpleNamespace(weight=torch.ones(3, 2048))
        self.load_state_dict(torch.load(path, weights_only=False))

    def forward(self, images: Tensor) -> tuple[Tensor]:
        assert images.dtype == torch.uint8
        self.Mixed_6d["branch1x1"](F.adaptive_avg_pool2d(images.float(), 17).repeat(1, 64, 1, 1))
        return (images.float().mean(dim=(1, 2, 3))[:, None] * self.scale,)


@pytest.fixture
def torch_fidelity(monkeypatch: pytest.MonkeyPatch) -> None:
    package, module = types.ModuleType("torch_fidelity"), types.ModuleType("feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = Extractor  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_fidelity", package)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", module)


@pytest.mark.usefixtures("torch_fidelity", "no_downloads")
def test_inception_is_torch_fidelitys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {"scale": torch.arange(2048.0)}
    torch.save(state, tmp_path / "mine.pth")
    safetensors.torch.save_file(state, tmp_path / "mine.safetensors")
    nets = [load_feature_net(f"inception:{tmp_path / name}") for name in ("mine.pth", "mine.safetensors")]
    assert [net.name for net in nets] == ["Inception-v3 of mine.pth", "Inception-v3 of mine.safetensors"]
    assert nets[0].hash == nets[1].hash
    assert torch.equal(nets[0](torch.full((2, 3, 8, 8), 2, dtype=torch.uint8)), 2 * state["scale"].expand(2, -1))
    assert not nets[0].standard

    images = noise_images(2, seed=4, size=17)
    pooled, spatial = nets[0].with_spatial(images)
    assert torch.equal(pooled, nets[0](images))
    # TensorFlow's layout: channels last. Of 192 channels, which repeat the colours here, the first seven.
    assert spatial.view(2, 17, 17, 7)[1, 3, 5].tolist() == images[1, [0, 1, 2, 0, 1, 2, 0], 3, 5].tolist()
    assert nets[0].num_spatial == spatial.shape[1] == 2023
    assert nets[0].classifier.shape == (3, 2048)

    published = RemoteWeights("http://127.0.0.1:9/mine.pth", feature_nets.sha256_of(tmp_path / "mine.pth")[:8])
    monkeypatch.setattr(feature_nets, "INCEPTION_WEIGHTS", published)
    known = load_feature_net(f"inception:{tmp_path / 'mine.pth'}")
    assert known.standard
    assert known.name == "Inception-v3 (torch-fidelity)"
    titles = [fid.Reference(net, FeatureStatistics.zeros(2048), {}).title("R") for net in (known, nets[0])]
    assert titles == ["FID[R]", "Fréchet distance[R] (Inception-v3 of mine.pth)"]


@pytest.mark.usefixtures("torch_fidelity", "no_downloads")
def test_inception_weights_that_do_not_fit_or_are_not_there(tmp_path: Path) -> None:
    torch.save({"other": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth .*Inception.*Missing key"):
        load_feature_net(f"inception:{tmp_path / 'other.pth'}")
    (tmp_path / "code.pth").write_bytes(pickle.dumps({"scale": print}, protocol=2))
    with pytest.raises(ValueError, match=r"read .*code\.pth"):
        load_feature_net(f"inception:{tmp_path / 'code.pth'}")
    with pytest.raises(OSError, match="--fid-features inception:PATH"):
        load_feature_net("inception")


def test_without_torch_fidelity_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(NoFeaturesError, match=r"torch-fidelity.*\[fid\].*random-vgg16"):
        load_feature_net("inception")


def test_the_perceptual_distance_is_named_after_its_weights(weights: Path) -> None:
    distance = PerceptualDistance(weights)
    assert distance.name == "perceptual distance (VGG-16 of mine.safetensors)"
    images = noise_images(2, seed=0, size=16) / 127.5 - 1
    found = distance(images, images.flip(0))
    assert found.shape == (2,)
    assert found.min() > 0
    assert torch.equal(distance(images, images), torch.zeros(2))


def test_metrics_look_through_their_networks_in_float32(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the models of a GPU's evaluation do not: TF32 and mixed precision would be part of the number."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    images = noise_images(2, seed=0, size=32)
    for net, inputs in (
        (load_feature_net(f"vgg16:{weights}"), (images,)),
        (PerceptualDistance(weights), (to_float(images), to_float(images.flip(0)))),
    ):
        tf32: list[bool] = []
        net.trunk.register_forward_hook(lambda *_, found=tf32: found.append(torch.backends.cudnn.allow_tf32))
        expected = net(*inputs)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(net(*inputs), expected)
        assert tf32
        assert not any(tf32)
        assert torch.backends.cudnn.allow_tf32
