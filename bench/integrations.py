"""A training step of other libraries' quantizers on a CPU, forward and backward, before and after ``accelerate``.

python bench/integrations.py               prints ratios and the MiB of resident memory that a step takes, for those
                                           of taming-transformers-rom1504, diffusers and vector-quantize-pytorch
                                           that are installed, and for IBQ in plain PyTorch
python bench/integrations.py --json FILE   writes them too; docs have bench/results/cpu-integrations.json
"""

import argparse
import datetime
import json
from typing import Any

import machine
import measuring
import records
import torch
from torch import Tensor, nn

from regvq_fast.integrations import accelerate
from regvq_fast.ops import vector_quantize

SIZES = {  # images, rows an image (a square), codes, channels
    "taming": (16, 256, 8192, 64),
    "diffusers": (16, 256, 8192, 64),
    "vector-quantize-pytorch": (16, 256, 8192, 64),
    "IBQ": (4, 256, 16384, 256),
}


class PlainIBQ(nn.Module):
    """The look-up of IBQ as its authors write it, which keeps several M x N matrices."""

    def __init__(self, num_codes: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_codes, width)

    def forward(self, z: Tensor) -> tuple[Tensor]:
        codebook, rows = self.embedding.weight, z.permute(0, 2, 3, 1)
        soft = (rows @ codebook.t()).softmax(-1)
        hard = torch.zeros_like(soft).scatter_(-1, soft.argmax(-1, keepdim=True), 1.0)
        return (((hard - soft.detach() + soft) @ codebook).permute(0, 3, 1, 2),)


class FusedIBQ(PlainIBQ):
    def forward(self, z: Tensor) -> tuple[Tensor]:
        codebook, rows = self.embedding.weight, z.permute(0, 2, 3, 1)
        out = vector_quantize(rows, codebook, weight=codebook, codebook_grad="hard")
        return (out.quantized.permute(0, 3, 1, 2),)


def build(library: str, ours: bool) -> nn.Module:
    """A quantizer of (B, D, H, W) maps, imported only where it is measured."""
    _, _, codes, width = SIZES[library]
    torch.manual_seed(0)
    if library == "IBQ":
        return (FusedIBQ if ours else PlainIBQ)(codes, width)
    if library == "taming":
        from taming.modules.vqvae.quantize import VectorQuantizer2

        quantizer = VectorQuantizer2(codes, width, beta=0.25)
        nn.init.normal_(quantizer.embedding.weight)
    elif library == "diffusers":
        from diffusers.models.autoencoders.vae import VectorQuantizer

        quantizer = VectorQuantizer(codes, width, beta=0.25)
        nn.init.normal_(quantizer.embedding.weight)
    else:
        from vector_quantize_pytorch import VectorQuantize

        quantizer = VectorQuantize(width, codes, accept_image_fmap=True)
    if ours:
        accelerate(quantizer)
    return quantizer


class Step:
    """Forward and backward of one batch: the codes and the gradient of the batch."""

    def __init__(self, library: str, ours: bool) -> None:
        images, rows, _, width = SIZES[library]
        self.quantizer = build(library, ours)
        side = round(rows**0.5)
        scale = width**-0.5 if library == "IBQ" else 1.0  # its logits are products: of variance 1
        self.batch = (torch.randn(images, width, side, side) * scale).requires_grad_()
        self.upstream = torch.randn(self.batch.shape)

    def __call__(self) -> tuple[Tensor, Tensor]:
        self.quantizer.zero_grad()
        self.batch.grad = None
        quantized = self.quantizer(self.batch)[0]
        quantized.backward(self.upstream)
        assert self.batch.grad is not None
        return quantized.detach(), self.batch.grad


def check(library: str) -> None:
    """Ties within rounding aside, both give the same: a wrong one reports no time."""
    for ours, theirs in zip(Step(library, True)(), Step(library, False)(), strict=True):
        wrong = ((ours - theirs).abs() > 1e-3 * theirs.abs().max()).float().mean()
        assert wrong < 1e-3, f"{library}: a share of {wrong:.4f} of the values differs"


def measure(library: str) -> dict[str, Any]:
    """Ratio of the medians of a step's seconds, and MiB, of a quantizer before ("library") and after ("regvq_fast")."""
    images, rows, codes, width = SIZES[library]
    check(library)
    steps: dict[str, measuring.Run] = {"library": Step(library, False), "regvq_fast": Step(library, True)}
    seconds = measuring.medians(steps, repeats=7)
    mib = {name: measuring.resident_growth(step) for name, step in steps.items()}
    return {
        "M, N, D": [images * rows, codes, width],
        "times as fast": round(seconds["library"] / seconds["regvq_fast"], 2),
        "MiB": {name: round(value, 1) for name, value in mib.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=records.path_to_write, help="file to write")
    path = parser.parse_args().json
    found = {"date": str(datetime.date.today()), **machine.describe_cpu(), **machine.describe_software()}
    found["quantizers"] = {}
    for library in SIZES:
        try:
            found["quantizers"][library] = measure(library)
        except ImportError as error:
            print(f"{library} is not installed ({error})")
            continue
        print(json.dumps({library: found["quantizers"][library]}), flush=True)
    if path:
        records.save(path, found)


if __name__ == "__main__":
    main()
