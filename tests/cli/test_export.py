"""``regvq export``: programs that give the tokenizer's tokens and images."""

import errno
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from helpers.tiny_models import tiny_vqgan
from torch import Tensor, nn

from regvq_fast.cli.export import ExportConfig, export
from regvq_fast.cli.main import run
from regvq_fast.models import VQGAN, exporting, weights_hash
from regvq_fast.quantizers import (
    BSQQuantizer,
    CodebookQuantizer,
    EMAQuantizer,
    FSQQuantizer,
    GumbelQuantizer,
    IBQQuantizer,
    LFQQuantizer,
    Quantizer,
    RegularizedQuantizer,
    SimVQQuantizer,
)

N, D = 16, 4
HAS_ONNX = all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime", "onnxscript"))


def tokenizer(quantizer: nn.Module) -> VQGAN:
    """A tokenizer with attention that uses several codes."""
    torch.manual_seed(0)
    model = tiny_vqgan(quantizer, num_res_blocks=1, attn_resolutions=(8,))
    latents = model.encode(torch.rand(4, 3, 16, 16) * 2 - 1)
    quantizer.initialize(latents)
    if isinstance(quantizer, CodebookQuantizer) and not isinstance(quantizer, RegularizedQuantizer):
        chosen = latents.detach().permute(0, 2, 3, 1).flatten(0, 2)[:: 4 * 64 // N]
        quantizer.embedding.weight.data.copy_(chosen)
    return model.eval()


@pytest.fixture(scope="module")
def regularized() -> VQGAN:
    return tokenizer(RegularizedQuantizer(N, D))


@pytest.fixture(scope="module")
def folder(regularized: VQGAN, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "tiny"
    regularized.save_pretrained(folder)
    return folder


def images_of(shape: tuple[int, ...]) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(3)) * 2 - 1


def test_pt2_programs_need_pytorch_alone_and_give_the_same_in_any_size(
    regularized: VQGAN, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("export", ["--run", str(folder), "--out", str(tmp_path)])
    encoder, decoder = (torch.export.load(tmp_path / f"{name}.pt2") for name in ("encoder", "decoder"))
    for program in (encoder, decoder):
        assert not [node for node in program.graph.nodes if "regvq" in str(node.target)]
    assert not [name for name in encoder.state_dict if name.startswith("decoder")]
    for shape in ((1, 3, 16, 16), (5, 3, 4, 24)):
        images = images_of(shape)
        tokens = encoder.module()(images)
        assert torch.equal(tokens, regularized.tokenize(images))
        assert len(tokens.unique()) > 2
        torch.testing.assert_close(decoder.module()(tokens), regularized.decode_indices(tokens))
    description = json.loads((tmp_path / "export.json").read_text())
    assert (description["num_codes"], description["downsampling_factor"]) == (N, 2)
    assert description["tokenizer"] == weights_hash(regularized)
    assert f"all of {description['compared']['tokens']} are" in capsys.readouterr().out


@pytest.mark.parametrize("kind", [GumbelQuantizer, SimVQQuantizer, IBQQuantizer])
def test_quantizers_with_learned_logits_or_codes_are_exported(kind: type[Quantizer]) -> None:
    model = tokenizer(kind(N, D)).requires_grad_(False)
    encoder = exporting._traced_encoder(model).module()
    tokens = encoder(images_of((3, 3, 16, 20)))
    assert torch.equal(tokens, model.tokenize(images_of((3, 3, 16, 20))))
    assert len(tokens.unique()) > 2
    decoder = exporting._traced_decoder(model).module()
    torch.testing.assert_close(decoder(tokens), model.decode_indices(tokens))


@pytest.mark.parametrize(
    "quantizer",
    [LFQQuantizer(2**10, 10), BSQQuantizer(2**10, 10), FSQQuantizer(1000, 4)],
    ids=lambda quantizer: type(quantizer).__name__,
)
@pytest.mark.parametrize("kind", ["pt2", *(["onnx"] if HAS_ONNX else [])])
def test_quantizers_without_a_table_of_codes_are_exported_without_one(quantizer, kind, tmp_path: Path) -> None:
    model = tokenizer(quantizer)
    model.save_pretrained(tmp_path / "folder")
    again = VQGAN.from_pretrained(tmp_path / "folder")
    assert again.quantize.arguments() == quantizer.arguments()
    agreement = exporting.export_tokenizer(again, tmp_path / "out", kind)
    assert agreement.different == 0
    encoder = exporting._load(tmp_path / "out" / f"encoder.{kind}", kind)
    images = images_of((2, 3, 16, 20))
    assert torch.equal(encoder(images), model.tokenize(images))
    assert len(model.tokenize(images).unique()) > 1
    for program in (exporting._traced_encoder(model), exporting._traced_decoder(model)):
        numbers = [node.meta["val"].numel() for node in program.graph.nodes if isinstance(node.meta.get("val"), Tensor)]
        assert not [count for count in numbers if isinstance(count, int) and count >= 10 * 2**10 - 1]


@pytest.mark.skipif(not HAS_ONNX, reason="the extra `export` (onnx, onnxruntime, onnxscript) is not installed")
def test_onnx_programs_give_the_same_in_any_size(regularized: VQGAN, folder: Path, tmp_path: Path) -> None:
    import onnxruntime

    export(ExportConfig(run=str(folder), out=tmp_path, format="onnx"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["decoder.onnx", "encoder.onnx", "export.json"]
    encoder, decoder = (onnxruntime.InferenceSession(tmp_path / f"{name}.onnx") for name in ("encoder", "decoder"))
    for shape in ((1, 3, 16, 16), (5, 3, 4, 24)):
        images = images_of(shape)
        (tokens,) = encoder.run(["tokens"], {"images": images.numpy()})
        tokens = torch.from_numpy(tokens)
        assert torch.equal(tokens, regularized.tokenize(images))
        (decoded,) = decoder.run(["images"], {"tokens": tokens.numpy()})
        torch.testing.assert_close(torch.from_numpy(decoded), regularized.decode_indices(tokens), atol=1e-4, rtol=0)


def test_programs_that_disagree_are_refused(regularized: VQGAN) -> None:
    decode = regularized.decode_indices

    def encode(images: Tensor) -> Tensor:
        return regularized.tokenize(images)

    assert exporting.compare(regularized, encode, decode) == (352, 0, 0.0)
    with pytest.raises(ValueError, match="tokens"):
        exporting.compare(regularized, lambda images: (encode(images) + 1) % N, decode)
    with pytest.raises(ValueError, match="images"):
        exporting.compare(regularized, encode, lambda tokens: decode(tokens) + 0.01)
    with pytest.raises(ValueError, match="nan"):
        exporting.compare(regularized, encode, lambda tokens: decode(tokens) * torch.nan)


def test_ties_are_counted_and_pass() -> None:
    model = tokenizer(EMAQuantizer(N, D))
    codes = model.quantize.embedding.weight.data
    codes[N // 2 :] = codes[: N // 2] * (1 + 1e-7)
    found = exporting.compare(model, lambda images: (model.tokenize(images) + N // 2) % N, model.decode_indices)
    assert found.different == found.tokens


def test_a_full_disk_leaves_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(model: VQGAN, into: Path, kind: str) -> exporting.Agreement:
        (into / f"encoder.{kind}").touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("regvq_fast.cli.export.export_tokenizer", write)
    with pytest.raises(OSError, match="No space left"):
        export(ExportConfig(run=str(folder), out=tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk_does_not_abort_the_process() -> None:
    program = torch.export.export(nn.Linear(1, 1), (torch.zeros(1, 1),))
    with pytest.raises(OSError, match="No space left"):
        exporting._save(program, Path("/dev/full"), "pt2", ("x", "y"))


def test_nothing_is_written_where_the_comparison_fails(
    regularized: VQGAN, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def zeros(value: Tensor) -> Tensor:
        return regularized.tokenize(value) if value.is_floating_point() else torch.zeros(())

    monkeypatch.setattr(exporting, "_traced_encoder", str)
    monkeypatch.setattr(exporting, "_traced_decoder", str)
    monkeypatch.setattr(exporting, "_save", lambda program, path, *_: path.write_text("a program"))
    monkeypatch.setattr(exporting, "_load", lambda path, kind: zeros)
    with pytest.raises(ValueError, match="nothing was written"):
        exporting.export_tokenizer(regularized, tmp_path, "pt2")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_exported_is_refused(
    regularized: VQGAN, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    with pytest.raises(FileExistsError, match="--out"):
        export(ExportConfig(run=str(folder), out=tmp_path / "there"))
    with pytest.raises(ValueError, match="pt3"):
        export(ExportConfig(run=str(folder), out=tmp_path / "out", format="pt3"))
    monkeypatch.setattr(exporting, "_ONNX_BYTES", 10)
    with pytest.raises(ValueError, match="2 GiB"):
        exporting.export_tokenizer(regularized, tmp_path / "out", "onnx")
    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.setattr(exporting, "_ONNX_BYTES", 1e9)
    with pytest.raises(ValueError, match=r"onnx.*pip install.*export"):
        exporting.export_tokenizer(regularized, tmp_path / "out", "onnx")
    monkeypatch.setattr(RegularizedQuantizer, "logits", Quantizer.logits)  # as of a quantizer that has none
    with pytest.raises(ValueError, match="RegularizedQuantizer has no logits"):
        exporting.export_tokenizer(regularized, tmp_path / "out", "pt2")
    assert not (tmp_path / "out").exists()
