"""Files of taming-transformers' own models: the same tokens, the same images, whatever stands around the weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.taming_models import taming_model, tokens_and_images
from safetensors.torch import save_file
from torch import Tensor, nn

from regvq_fast.models import VQGAN, PatchDiscriminator
from regvq_fast.models.taming_weights import discriminator_in, read_taming
from regvq_fast.quantizers import GumbelQuantizer, NearestQuantizer

YAML = """
model:
  target: taming.models.vqgan.VQModel
  params:
    embed_dim: 16
    n_embed: 64
    ddconfig:
      double_z: false
      z_channels: 16
      resolution: {resolution}
      in_channels: 3
      out_ch: 3
      ch: {ch}
      ch_mult: [1, 2]
      num_res_blocks: 1
      attn_resolutions: [{attention}]
      dropout: 0.0
"""


def images() -> Tensor:
    return torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


def assert_same(ours: VQGAN, theirs: Any) -> None:
    """100 % of the tokens, and images to 1e-5 of their norm."""
    tokens, expected = tokens_and_images(theirs, images())
    assert len(tokens.unique()) > 8
    assert torch.equal(ours.tokenize(images()), tokens)
    assert (ours.decode_indices(tokens) - expected).norm() <= 1e-5 * expected.norm()
    with torch.no_grad():
        assert (ours(images()).reconstruction - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize(("kind", "ch"), [("VQModel", 32), ("VQModel", 128), ("GumbelVQ", 32), ("GumbelVQ", 128)])
def test_parity_with_tamings_own_classes(tmp_path: Path, kind: str, ch: int) -> None:
    theirs = taming_model(kind, ch=ch)
    torch.save({"epoch": 1, "state_dict": theirs.state_dict()}, tmp_path / "last.ckpt")
    ours = VQGAN.from_taming(tmp_path / "last.ckpt", image_size=32)
    assert not ours.training
    assert isinstance(ours.quantize, GumbelQuantizer if kind == "GumbelVQ" else NearestQuantizer)
    assert {norm.num_groups for norm in ours.modules() if isinstance(norm, nn.GroupNorm)} == {32}
    assert_same(ours, theirs)
    ours.save_pretrained(tmp_path / "folder")
    assert_same(VQGAN.from_pretrained(tmp_path / "folder"), theirs)


def _ckpt(state: dict[str, Tensor], folder: Path) -> Path:
    torch.save({"global_step": 1, "state_dict": state}, folder / "last.ckpt")
    return folder / "last.ckpt"


def _pth(state: dict[str, Tensor], folder: Path) -> Path:
    torch.save({f"module.{name}": value for name, value in state.items()}, folder / "weights.pth")
    return folder / "weights.pth"


def _safetensors(state: dict[str, Tensor], folder: Path) -> Path:
    save_file({f"_orig_mod.module.{name}": value for name, value in state.items()}, folder / "weights.safetensors")
    return folder / "weights.safetensors"


def _transformer(state: dict[str, Tensor], folder: Path) -> Path:
    """As of a Net2NetTransformer, whose condition has a model of tokens, too."""
    first = {f"first_stage_model.{name}": value for name, value in state.items()}
    condition = {f"cond_stage_model.{name}": value + 1 for name, value in state.items()}
    torch.save({"state_dict": condition | first | {"transformer.head.weight": torch.ones(2, 2)}}, folder / "last.ckpt")
    return folder / "last.ckpt"


def _half(state: dict[str, Tensor], folder: Path) -> Path:
    torch.save(
        {name: value.half() if value.is_floating_point() else value for name, value in state.items()}, folder / "h.pt"
    )
    return folder / "h.pt"


@pytest.mark.parametrize("save", [_ckpt, _pth, _safetensors, _transformer])
@pytest.mark.parametrize("kind", ["VQModel", "GumbelVQ"])
def test_files_with_losses_and_prefixes(tmp_path: Path, kind: str, save: Callable[..., Path]) -> None:
    theirs = taming_model(kind)
    path = save(theirs.state_dict(), tmp_path)
    assert_same(VQGAN.from_taming(path, image_size=32), theirs)
    found = discriminator_in(read_taming(path).state_dict)
    assert found is not None
    sizes, weights = found
    discriminator = PatchDiscriminator(**sizes).eval()
    discriminator.load_state_dict(weights)
    torch.testing.assert_close(discriminator(images()), theirs.loss.discriminator.eval()(images()))


def test_half_precision_is_widened(tmp_path: Path) -> None:
    model = VQGAN.from_taming(_half(taming_model().state_dict(), tmp_path), image_size=32)
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}


def test_the_numbers_of_tensors_are_reported() -> None:
    theirs = taming_model()
    ours = VQGAN(NearestQuantizer(64, 16), **_sizes())
    state = {f"module.{name}": value for name, value in theirs.state_dict().items()}
    loaded = ours.load_taming_state_dict({"state_dict": state | {"step": torch.ones(1)}})
    losses = len(theirs.loss.state_dict())
    assert (loaded.taken, loaded.prefix, len(loaded.left_out)) == (len(ours.state_dict()), "module.", losses + 1)
    assert str(loaded) == (
        f"{loaded.taken} tensors loaded from module.*, {losses + 1} left out (loss.* {losses}, step 1)"
    )


def _sizes() -> dict[str, Any]:
    return {
        "image_size": 32,
        "ch": 32,
        "ch_mult": (1, 2),
        "num_res_blocks": 1,
        "attn_resolutions": (16,),
        "z_channels": 16,
        "norm_groups": 32,
    }


@pytest.mark.parametrize("strict", [True, False])
def test_weights_of_which_no_name_fits_are_refused(strict: bool) -> None:
    ours = VQGAN(NearestQuantizer(64, 16), **_sizes())
    for state in ({}, {"state_dict": {}}, {"head.weight": torch.ones(1)}):
        with pytest.raises(ValueError, match=r"none of the \d names.* fits this VQGAN"):
            ours.load_taming_state_dict(state, strict=strict)
    before = ours.encoder.conv_in.bias.detach().clone()
    loaded = ours.load_taming_state_dict({"module.encoder.conv_in.bias": before + 1}, strict=False)
    assert loaded.taken == 1
    assert torch.equal(ours.encoder.conv_in.bias, before + 1)


@pytest.mark.parametrize("place", ["beside", "configs", "given"])
def test_a_yaml_has_the_size_of_the_images(tmp_path: Path, place: str) -> None:
    pytest.importorskip("yaml")
    theirs = taming_model()
    (folder := tmp_path / "log" / "checkpoints").mkdir(parents=True)
    path = _ckpt(theirs.state_dict(), folder)
    yaml = {
        "beside": folder / "last.yaml",
        "configs": tmp_path / "log" / "configs" / "p.yaml",
        "given": tmp_path / "y",
    }[place]
    yaml.parent.mkdir(exist_ok=True)
    (folder / "other.yaml").write_text(YAML.format(resolution=512, ch=64, attention=256))
    (folder / "broken.yaml").write_text("a: [")
    yaml.write_text(YAML.format(resolution=32, ch=32, attention=16))
    given = {"config": yaml} if place == "given" else {}
    model = VQGAN.from_taming(path, **given)
    assert (model.image_size, model.architecture()["attn_resolutions"]) == (32, [16])
    assert read_taming(path, **given).config == yaml
    assert_same(model, theirs)
    smaller = VQGAN.from_taming(path, **given, image_size=16)  # the same levels have attention
    assert (smaller.token_shape, smaller.architecture()["attn_resolutions"]) == ((8, 8), [8])
    assert_same(smaller, theirs)


def test_without_a_yaml_images_have_256_pixels(tmp_path: Path) -> None:
    architecture = read_taming(_ckpt(taming_model().state_dict(), tmp_path)).architecture
    assert (architecture["image_size"], architecture["attn_resolutions"]) == (256, [128])


def test_files_that_are_refused(tmp_path: Path) -> None:
    state = taming_model().state_dict()
    with pytest.raises(FileNotFoundError, match=r"no\.ckpt"):
        VQGAN.from_taming(tmp_path / "no.ckpt")
    pytest.importorskip("yaml")
    (tmp_path / "other.yaml").write_text(YAML.format(resolution=32, ch=64, attention=16))
    path = _ckpt(state, tmp_path)
    with pytest.raises(ValueError, match=r"other\.yaml.*another model.*last\.ckpt"):
        VQGAN.from_taming(path, config=tmp_path / "other.yaml")
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(ValueError, match=r"broken\.yaml"):
        VQGAN.from_taming(path, config=tmp_path / "broken.yaml")
    for missing, message in {
        "quantize.embedding.weight": "no codebook",
        "decoder.conv_out.weight": r"decoder\.conv_out\.weight",
        "encoder.mid.block_1.conv1.bias": r"missing: encoder\.mid\.block_1\.conv1\.bias",
    }.items():
        rest = {name: value for name, value in state.items() if name != missing}
        with pytest.raises(ValueError, match=rf"last\.ckpt: .*(\s.*)*{message}"):
            VQGAN.from_taming(_ckpt(rest, tmp_path))
    with pytest.raises(ValueError, match=r"last\.ckpt: none of the 1 names"):
        VQGAN.from_taming(_ckpt({"a": torch.ones(1)}, tmp_path))
    with pytest.raises(ValueError, match=r"4 channels and gives 3"):
        VQGAN.from_taming(_ckpt(state | {"encoder.conv_in.weight": torch.ones(32, 4, 3, 3)}, tmp_path))


def test_groups_that_do_not_divide_a_width_are_refused() -> None:
    with pytest.raises(ValueError, match=r"norm_groups 32 .*\b8, 16"):
        VQGAN(NearestQuantizer(4, 4), ch=8, ch_mult=(1, 2), norm_groups=32)
    model = VQGAN(NearestQuantizer(4, 4), **{**_sizes(), "norm_groups": None})
    assert {norm.num_groups for norm in model.modules() if isinstance(norm, nn.GroupNorm)} == {8, 16}
