"""Export of tokenizers as programs that run without this library: PyTorch's ``.pt2`` and ONNX.

    encoder   images (B, 3, H, W) float32 in [-1, 1] -> tokens (B, h, w) int64
    decoder   tokens (B, h, w) int64 -> images (B, 3, H, W) float32, not clamped

B, h and w are dynamic, h and w at least 2; H and W are h and w times the down-sampling factor. The best code is found
in plain PyTorch, for a codebook with all B*h*w x N logits in memory.
"""

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from regvq_fast.files import atomic_path
from regvq_fast.invocation import install
from regvq_fast.models.vqgan import VQGAN

Format = Literal["pt2", "onnx"]
Program = Callable[[Tensor], Tensor]

IMAGE_TOLERANCE = 1e-3
"""Largest accepted difference of a decoded value in [-1, 1]; one 8-bit level is 0.0078."""
TIE = 1e-3
"""Largest accepted difference of a token's logit from the best one, in standard deviations of the logits."""
_ONNX_BYTES = 2_000_000_000  # most bytes of weights; a protobuf holds 2 GiB with the graph
_SEED = 0


class Agreement(NamedTuple):
    """Comparison of exported programs with the model."""

    tokens: int
    """Number of tokens compared."""
    different: int
    """Number of tokens that differ, all of them ties."""
    image_error: float
    """Largest difference of a decoded value."""


class TokenEncoder(nn.Module):
    """Encoder and quantizer of a float32 tokenizer, in plain PyTorch."""

    def __init__(self, model: VQGAN) -> None:
        super().__init__()
        self.encoder, self.quant_conv, self.quantize = model.encoder, model.quant_conv, model.quantize

    def forward(self, images: Tensor) -> Tensor:
        """Return tokens (B, h, w) int64 of images (B, 3, H, W) in [-1, 1]."""
        return self.quantize.best_codes(self.quant_conv(self.encoder(images)))


class TokenDecoder(nn.Module):
    """Codebook and decoder of a float32 tokenizer, in plain PyTorch."""

    def __init__(self, model: VQGAN) -> None:
        super().__init__()
        self.quantize, self.post_quant_conv, self.decoder = model.quantize, model.post_quant_conv, model.decoder

    def forward(self, tokens: Tensor) -> Tensor:
        """Return images (B, 3, H, W), not clamped, of tokens (B, h, w) int64."""
        return self.decoder(self.post_quant_conv(self.quantize.codes_of(tokens)))


def export_tokenizer(model: VQGAN, folder: Path, kind: Format) -> Agreement:
    """Export a tokenizer as ``encoder.KIND`` and ``decoder.KIND``, run both, and compare them with the model.

    Both compute in float32 and are compared on a CPU. The files appear in the folder only if they agree.

    Args:
        model: on any device.
        folder: created if missing.
        kind: "pt2" for :func:`torch.export.load`, or "onnx".

    Raises:
        ValueError: an unknown format, a missing package for ONNX, a quantizer without ``logits``, or programs that
            don't agree with the model.
        OSError: the folder can't be written.
    """
    if kind not in get_args(Format):
        raise ValueError(f"format must be one of {', '.join(map(repr, get_args(Format)))}, got {kind!r}")
    if kind == "onnx":
        _check_onnx(sum(value.nbytes for value in model.state_dict().values()))
    try:
        model.quantize.logits(torch.zeros(1, model.quantize.code_dim, 1, 1, device=model.last_layer.device))
    except NotImplementedError as error:
        raise ValueError(f"a tokenizer is exported by the logits of its quantizer: {error}") from None
    model = copy.deepcopy(model).cpu().float().eval().requires_grad_(False)
    with atomic_path(folder / f"encoder.{kind}") as encoder, atomic_path(folder / f"decoder.{kind}") as decoder:
        with _quiet():
            for path, program, names in (
                (encoder, _traced_encoder(model), ("images", "tokens")),
                (decoder, _traced_decoder(model), ("tokens", "images")),
            ):
                _save(program, path, kind, names)
        return compare(model, _load(encoder, kind), _load(decoder, kind))


def compare(model: VQGAN, encoder: Program, decoder: Program) -> Agreement:
    """Compare exported programs with their model, on images decoded from random tokens, in two shapes.

    Raises:
        ValueError: a token that differs and is no tie, or an image beyond the tolerance.
    """
    generator = torch.Generator().manual_seed(_SEED)
    (height, width), count = _least_shape(model), model.quantize.num_codes
    compared = different = 0
    errors = []
    for shape in ((1, height, width), (2, height + 1, 2 * width)):
        tokens = torch.randint(count, shape, generator=generator)
        images = model.decode_indices(tokens)
        errors.append((decoder(tokens) - images).abs().max())
        images = images.clamp(-1, 1)
        expected, found = model.tokenize(images), encoder(images)
        compared, differs = compared + found.numel(), found != expected
        different += int(differs.sum())
        wrong = _count_wrong(model, model.encode(images).movedim(1, -1)[differs], found[differs])
        if wrong:
            raise ValueError(f"{wrong} of {found.numel()} exported tokens are not the model's: nothing was written")
    error = float(torch.stack(errors).max())
    if not error <= IMAGE_TOLERANCE:
        raise ValueError(
            f"exported images differ by {error:.1e} from the model's, at most {IMAGE_TOLERANCE:g} is allowed: nothing "
            "was written"
        )
    return Agreement(compared, different, error)


def _count_wrong(model: VQGAN, latents: Tensor, tokens: Tensor) -> int:
    """Return the number of tokens (K,) of latents (K, D) that are neither the best ones nor ties."""
    if not len(tokens):
        return 0
    logits = model.quantize.logits(latents)
    gap = (logits.amax(-1) - logits.gather(-1, tokens[:, None])[:, 0]) / logits.std(-1).clamp(min=1e-12)
    return int((~(gap <= TIE)).sum())


def _least_shape(model: VQGAN) -> tuple[int, int]:
    """Return h and w of the tokens of an image of the model's size, at least 2."""
    height, width = model.token_shape
    return max(height, 2), max(width, 2)


def _traced_encoder(model: VQGAN) -> ExportedProgram:
    batch, h, w = Dim("batch"), Dim("h", min=2), Dim("w", min=2)
    factor, (height, width) = model.downsampling_factor, _least_shape(model)
    images = torch.zeros(2, model.in_channels, height * factor, width * factor)
    sides = {2: factor * h, 3: factor * w} if factor > 1 else {2: h, 3: w}
    return torch.export.export(TokenEncoder(model), (images,), dynamic_shapes=({0: batch, **sides},))


def _traced_decoder(model: VQGAN) -> ExportedProgram:
    batch, h, w = Dim("batch"), Dim("h", min=2), Dim("w", min=2)
    tokens = torch.zeros(2, *_least_shape(model), dtype=torch.int64)
    return torch.export.export(TokenDecoder(model), (tokens,), dynamic_shapes=({0: batch, 1: h, 2: w},))


def _save(program: ExportedProgram, path: Path, kind: Format, names: tuple[str, str]) -> None:
    if kind == "pt2":
        buffer = io.BytesIO()  # on a full disk PyTorch's own writer aborts the process
        torch.export.save(program, buffer)
        path.write_bytes(buffer.getbuffer())
        return
    torch.onnx.export(
        program, f=path, dynamo=True, input_names=names[:1], output_names=names[1:], external_data=False, verbose=False
    )


def _load(path: Path, kind: Format) -> Program:
    """Return an exported program as a function of CPU tensors."""
    if kind == "pt2":
        return torch.export.load(path).module()
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda value: torch.from_numpy(session.run(None, {name: value.numpy()})[0])


def _check_onnx(size: int) -> None:
    """Raise ValueError if the weights are too large for an ONNX file, or a package is missing."""
    if size > _ONNX_BYTES:
        raise ValueError(f"an ONNX file holds 2 GiB, these weights take {size / 2**30:.1f} GiB: use --format pt2")
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ModuleNotFoundError as error:
        raise ValueError(f"--format onnx needs {error.name}: {install('export')}") from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence warnings and logs of the exporters."""
    exporter = logging.getLogger("torch.onnx")
    level = exporter.level
    exporter.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        exporter.setLevel(level)
