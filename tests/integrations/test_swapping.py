"""Swapping, skipping and reporting by `swap_quantizers`, on stand-ins for a library's classes."""

import copy
import io
import pickle
import sys
from types import ModuleType

import pytest
import torch
from torch import nn

from regvq_fast.integrations import accelerate, adapter, swap_quantizers
from regvq_fast.ops import assign_codes

PATH = "taming.modules.vqvae.quantize"


class VectorQuantizer2(nn.Module):
    """Stand-in: taming's interface, outputs that no quantizer has."""

    def __init__(self, num_codes=16, width=4):
        super().__init__()
        self.embedding = nn.Embedding(num_codes, width)
        self.beta, self.legacy, self.remap, self.sane_index_shape = 0.25, False, None, False

    def forward(self, z, temp=None, rescale_logits=False, return_logits=False):
        return "the library's"

    def remap_to_used(self, indices):
        return indices

    def get_codebook_entry(self, indices):
        return self.embedding(indices)


@pytest.fixture(autouse=True)
def _library(monkeypatch):
    """The stand-in as a module's class, so that pickles find it."""
    names = PATH.split(".")
    for parts in range(1, len(names) + 1):
        monkeypatch.setitem(sys.modules, ".".join(names[:parts]), ModuleType(names[parts - 1]))
    monkeypatch.setattr(sys.modules[PATH], "VectorQuantizer2", VectorQuantizer2, raising=False)
    monkeypatch.setattr(VectorQuantizer2, "__module__", PATH)
    torch.manual_seed(0)


class Autoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.quantize = nn.Conv2d(3, 4, 1), VectorQuantizer2()

    def forward(self, images):
        return self.quantize(self.encoder(images))


def images():
    return torch.randn(2, 3, 4, 4)


def check_swapped(model):
    quantized, loss, (_, _, indices) = model(images())
    assert quantized.shape == (2, 4, 4, 4)
    assert loss.ndim == 0
    assert indices.shape == (32,)


def test_only_the_class_of_the_quantizer_changes():
    model = Autoencoder()
    before, attributes = copy.deepcopy(model.state_dict()), dict(vars(model.quantize))
    parameters = list(model.parameters())
    assert swap_quantizers(model) == ({"quantize": "VectorQuantizer2"}, {})
    check_swapped(model)
    assert isinstance(model.quantize, VectorQuantizer2)
    assert repr(type(model.quantize)) == repr(VectorQuantizer2)
    assert vars(model.quantize) == attributes
    assert all(ours is theirs for ours, theirs in zip(model.parameters(), parameters, strict=True))
    assert model.state_dict().keys() == before.keys()
    model.load_state_dict(before)
    assert torch.equal(model.quantize.get_codebook_entry(torch.tensor([3])), before["quantize.embedding.weight"][3:4])
    assert VectorQuantizer2()(images()) == "the library's"


def test_the_name_of_before():
    assert accelerate is swap_quantizers


def test_twice_is_once():
    model = Autoencoder()
    report = swap_quantizers(model)
    swapped_class = type(model.quantize)
    assert swap_quantizers(model) == report
    assert type(model.quantize) is swapped_class


def test_a_quantizer_by_itself():
    quantizer = VectorQuantizer2()
    assert swap_quantizers(quantizer).swapped == {"": "VectorQuantizer2"}
    assert quantizer(torch.randn(2, 4, 4, 4))[0].shape == (2, 4, 4, 4)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_swapped_too(copier):
    model = Autoencoder()
    swap_quantizers(model)
    copied = copier(model)
    check_swapped(copied)
    assert type(copied.quantize) is type(model.quantize)
    torch.testing.assert_close(copied.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert copied.quantize.embedding.weight is not model.quantize.embedding.weight


def test_saved_whole():
    model, file = Autoencoder(), io.BytesIO()
    swap_quantizers(model)
    torch.save(model, file)
    file.seek(0)
    check_swapped(torch.load(file, weights_only=False))


def test_compiled_in_one_graph():
    model, batch = Autoencoder(), images()
    swap_quantizers(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(batch), model(batch))


def test_under_autocast_the_look_up_stays_in_fp32():
    model, batch = Autoencoder(), images()
    swap_quantizers(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        latents = model.encoder(batch)
        quantized, _, (_, _, indices) = model(batch)
    assert latents.dtype == torch.bfloat16
    assert quantized.dtype == torch.float32
    rows = latents.permute(0, 2, 3, 1).reshape(-1, 4).float()
    assert torch.equal(indices, assign_codes(rows, model.quantize.embedding.weight))


@pytest.mark.parametrize("fp32", [False, True])
def test_on_a_gpu_rows_and_codes_meet_in_16_bits_unless_fp32_is_wanted(fp32, monkeypatch):
    """As on a GPU, whose rule takes the place of the CPU's."""
    monkeypatch.setattr(adapter, "score_dtype", lambda rows, codes, fp32: torch.float32 if fp32 else rows.dtype)
    model, batch = Autoencoder(), images()
    swap_quantizers(model, fp32_scores=fp32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rows = model.encoder(batch).permute(0, 2, 3, 1).reshape(-1, 4)
        _, _, (_, _, indices) = model(batch)
    codes = model.quantize.embedding.weight.detach()
    expected = assign_codes(rows.float(), codes) if fp32 else assign_codes(rows, codes.bfloat16())
    assert torch.equal(indices, expected)
    assert not torch.equal(codes, codes.bfloat16().float()), "rounded codes would hide the difference"


def test_subclasses_are_left_alone():
    class Own(VectorQuantizer2):
        pass

    model = nn.ModuleList([Own(), VectorQuantizer2()])
    report = swap_quantizers(model)
    assert report.swapped == {"1": "VectorQuantizer2"}
    assert report.left_alone == {"0": "Own: a subclass of VectorQuantizer2, which may compute something else"}
    assert type(model[0]) is Own


def test_releases_with_other_arguments_are_left_alone(monkeypatch):
    monkeypatch.setattr(VectorQuantizer2, "forward", lambda self, z, noise: None)
    with pytest.raises(ValueError, match=r"VectorQuantizer2.* \(z, noise\)"):
        swap_quantizers(Autoencoder())


def test_a_model_without_a_known_quantizer():
    with pytest.raises(ValueError, match=r"Linear.*taming"):
        swap_quantizers(nn.Linear(2, 2))


def test_what_is_no_model():
    with pytest.raises(TypeError, match=r"torch\.nn\.Module.* dict$"):
        swap_quantizers({"quantize": 1})


def test_copies_of_the_file_in_other_packages_are_not_known(monkeypatch):
    """They may have options of their own: SEED-Voken's copy of taming's file has."""
    monkeypatch.setattr(VectorQuantizer2, "__module__", f"own.{PATH}")
    with pytest.raises(ValueError, match="Autoencoder"):
        swap_quantizers(Autoencoder())


def test_a_fork_is_swapped_where_its_interface_is_named(monkeypatch):
    monkeypatch.setattr(VectorQuantizer2, "__module__", "own.quantize")
    model = Autoencoder()
    assert swap_quantizers(model, also={"own.quantize.VectorQuantizer2": "nearest"}) == (
        {"quantize": "VectorQuantizer2"},
        {},
    )
    check_swapped(model)
    assert swap_quantizers(model).swapped == {"quantize": "VectorQuantizer2"}, "without its name, once it is swapped"


def test_a_subclass_is_swapped_where_its_interface_is_named():
    class Own(VectorQuantizer2):
        def forward(self, z):  # diffusers' arguments, as "nearest" may have
            return "its own"

    path = f"{Own.__module__}.{Own.__qualname__}"
    model = nn.ModuleList([Own(), VectorQuantizer2()])
    assert swap_quantizers(model, also={path: "nearest"}).swapped == {"0": "Own", "1": "VectorQuantizer2"}
    assert len(model[0](torch.randn(2, 4, 4, 4))) == 3


@pytest.mark.parametrize(
    ("also", "message"),
    [
        ({f"{PATH}.VectorQuantizer2": "closest"}, "'closest'.*'nearest'"),
        ({"own.VectorQuantizer2": "nearest"}, rf"own\.VectorQuantizer2.*did you mean {PATH}\.VectorQuantizer2\?"),
        ({"own.Missing": "nearest"}, r"own\.Missing.*Autoencoder has no module.*__module__"),
        ({f"{PATH}.VectorQuantizer2": "llamagen"}, r"forward takes \(z, temp, .*not the \(z\)"),
        ({"torch.nn.modules.conv.Conv2d": "encodec"}, "no method quantize|forward takes"),
    ],
)
def test_what_also_names_is_checked_before_anything_is_swapped(also, message):
    model = Autoencoder()
    with pytest.raises(ValueError, match=message):
        swap_quantizers(model, also=also)
    assert type(model.quantize) is VectorQuantizer2


def test_attributes_that_an_interface_has():
    model = Autoencoder()
    del model.quantize.legacy
    with pytest.raises(ValueError, match="has no legacy"):
        swap_quantizers(model)
