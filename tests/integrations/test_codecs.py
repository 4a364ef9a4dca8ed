"""EnCodec's and DAC's codebooks, before and after: transformers' classes, and the packages' own where installed."""

import copy
import importlib
import importlib.machinery
import importlib.util
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from helpers.same_steps import assert_same_steps, largest_tensor

from regvq_fast.integrations import swap_quantizers

CODES, WIDTH = 64, 8


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def quantizer_module(monkeypatch, package, *names):
    """A package's module without what its ``__init__`` imports: torchaudio, audiotools."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip(f"{package} isn't installed")
    pytest.importorskip("einops")
    path, folders = package, list(spec.submodule_search_locations)
    for name in (None, *names[:-1]):
        if name is not None:
            path, folders = f"{path}.{name}", [f"{folder}/{name}" for folder in folders]
        if path not in sys.modules:
            bare = ModuleType(path)
            bare.__path__ = folders
            bare.__spec__ = importlib.machinery.ModuleSpec(path, None, is_package=True)
            monkeypatch.setitem(sys.modules, path, bare)
    return importlib.import_module(f"{path}.{names[-1]}")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [{}, {"threshold_ema_dead_code": 2}, {"kmeans_init": True}, {"codebook_dim": 4}])
def test_encodec(options, training, monkeypatch):
    core = quantizer_module(monkeypatch, "encodec", "quantization", "core_vq")
    options = {"kmeans_init": False, "kmeans_iters": 3, "threshold_ema_dead_code": 0} | options
    quantizer = core.VectorQuantization(WIDTH, CODES, **options).train(training)
    assert_same_steps(quantizer, torch.randn(3, WIDTH, 40))


def test_encodecs_residual_quantizer(monkeypatch):
    core = quantizer_module(monkeypatch, "encodec", "quantization", "core_vq")
    residual = core.ResidualVectorQuantization(
        num_quantizers=3, dim=WIDTH, codebook_size=CODES, kmeans_init=False, threshold_ema_dead_code=0
    )
    assert_same_steps(residual, torch.randn(3, WIDTH, 40))
    indices = residual.encode(torch.randn(3, WIDTH, 40))
    swapped = copy.deepcopy(residual)
    assert list(swap_quantizers(swapped).swapped) == [f"layers.{layer}._codebook" for layer in range(3)]
    torch.testing.assert_close(swapped.decode(indices), residual.decode(indices), rtol=0, atol=0)


def test_encodec_keeps_nothing_as_large_as_the_distances(monkeypatch):
    core = quantizer_module(monkeypatch, "encodec", "quantization", "core_vq")
    quantizer, rows = core.EuclideanCodebook(WIDTH, 256, threshold_ema_dead_code=0), torch.randn(256, WIDTH)
    assert largest_tensor(quantizer, rows) >= 256 * 256
    swap_quantizers(quantizer)
    assert largest_tensor(quantizer, rows) < 256 * 256 / 8


@pytest.mark.parametrize("training", [True, False])
def test_dac(training, monkeypatch):
    quantize = quantizer_module(monkeypatch, "dac", "nn", "quantize")
    quantizer, z = quantize.VectorQuantize(12, CODES, WIDTH).train(training), torch.randn(3, 12, 40)
    with torch.no_grad():  # weights that can be copied, which weight_norm's aren't before
        quantizer(z)
    assert_same_steps(quantizer, z)


def test_dacs_residual_quantizer(monkeypatch):
    quantize = quantizer_module(monkeypatch, "dac", "nn", "quantize")
    residual, z = quantize.ResidualVectorQuantize(12, 3, CODES, WIDTH, quantizer_dropout=0.5), torch.randn(4, 12, 40)
    with torch.no_grad():
        residual(z)
    assert_same_steps(residual, z)


def encodec_model():
    transformers = pytest.importorskip("transformers")
    config = transformers.EncodecConfig(
        target_bandwidths=[1.5], sampling_rate=240, upsampling_ratios=[2, 2], num_filters=2, hidden_size=WIDTH,
        codebook_dim=WIDTH, codebook_size=CODES, num_lstm_layers=1,
    )  # fmt: skip
    return transformers.EncodecModel(config).eval()


def dac_model():
    transformers = pytest.importorskip("transformers")
    config = transformers.DacConfig(
        encoder_hidden_size=4, decoder_hidden_size=8, downsampling_ratios=[2, 2], upsampling_ratios=[2, 2],
        n_codebooks=3, codebook_size=CODES, codebook_dim=WIDTH,
    )  # fmt: skip
    return transformers.DacModel(config)


def test_encodec_of_transformers():
    model, audio = encodec_model(), torch.randn(2, 1, 64).cumsum(2)
    for name, buffer in model.named_buffers():
        if name.endswith(".embed"):
            buffer.normal_(std=0.1)  # as large as the latents
    expected = model(audio)
    assert len(swap_quantizers(model).swapped) == len(model.quantizer.layers) > 1
    out = model(audio)
    assert len(out.audio_codes.unique()) > 10
    assert torch.equal(out.audio_codes, expected.audio_codes)
    assert torch.equal(out.audio_values, expected.audio_values)


class LookUp(torch.nn.Module):
    def __init__(self, codebook):
        super().__init__()
        self.codebook = codebook

    def forward(self, rows):
        return self.codebook.encode(rows)


@pytest.mark.parametrize("training", [True, False])
def test_dac_of_transformers(training):
    quantizers = dac_model().quantizer.train(training)
    hidden = quantizers.quantizers[0].in_proj.in_channels
    assert_same_steps(quantizers, torch.randn(3, hidden, 40))
    quantizer, latents = quantizers.quantizers[0], torch.randn(2, hidden, 512)
    assert largest_tensor(quantizer, latents) >= 1024 * CODES
    swap_quantizers(quantizer)
    assert largest_tensor(quantizer, latents) < 1024 * CODES


def test_dacs_model_of_transformers():
    model, audio = dac_model().eval(), torch.randn(2, 1, 64)
    swapped = copy.deepcopy(model)
    assert len(swap_quantizers(swapped).swapped) == 3
    with torch.no_grad():
        expected, out = model(audio), swapped(audio)
    assert torch.equal(out.audio_codes, expected.audio_codes)
    assert torch.equal(out.audio_values, expected.audio_values)


def test_an_offloaded_codebook_is_not_covered():
    quantizer = dac_model().quantizer.quantizers[0]
    quantizer.codebook._hf_hook = object()
    with pytest.raises(ValueError, match=r"DacVectorQuantize: .*offloads"):
        swap_quantizers(quantizer)


def test_encodec_of_transformers_keeps_nothing_as_large_as_the_distances():
    look_up, rows = LookUp(encodec_model().quantizer.layers[0].codebook), torch.randn(256, WIDTH)
    assert largest_tensor(look_up, rows) >= 256 * CODES
    swap_quantizers(look_up)
    assert largest_tensor(look_up, rows) < 256 * CODES / 4


def test_forks_of_encodec():
    modeling = pytest.importorskip("transformers.models.wavtokenizer.modeling_wavtokenizer")
    config = SimpleNamespace(codebook_size=CODES, codebook_dim=WIDTH)
    codebook, rows = modeling.WavTokenizerEuclideanCodebook(config), torch.randn(2, 40, WIDTH)
    codebook.embed.normal_()
    expected = codebook.encode(rows)
    path = f"{modeling.__name__}.WavTokenizerEuclideanCodebook"
    assert swap_quantizers(codebook, also={path: "encodec"}).swapped == {"": "WavTokenizerEuclideanCodebook"}
    assert torch.equal(codebook.encode(rows), expected)
