"""Some training steps, alone or on several ranks of one run. Rank 0 writes weights and metrics of each case.

python -m torch.distributed.run --nproc-per-node 2 train_on_ranks.py FOLDER
"""

import copy
import functools
import sys
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch

from regvq_fast.losses import LPIPS, LeCAM, ProbabilisticContrastiveLoss, ReconstructionLoss
from regvq_fast.models import VQGAN, PatchDiscriminator, VGGFeatures
from regvq_fast.precision import Precision
from regvq_fast.quantizers import QUANTIZERS, RegularizedQuantizer
from regvq_fast.ranks import mean_over_ranks, process_group, rank, world_size
from regvq_fast.training.vqgan_step import VQGANStep

BATCH, STEPS = 8, 5


class Case(NamedTuple):
    quantizer: str = "reg-vq"
    by_image: bool = False
    """Only losses that are means over images."""
    parts: int = 1
    compile: bool = False
    regularized: bool = False
    """LeCAM and R1 on the discriminator."""


CASES = {
    "reg-vq": Case(),
    **{name: Case(name) for name in ("vq-vae", "ibq", "lfq", "bsq")},
    "parts": Case(by_image=True, parts=2),
    "compiled": Case(compile=True),
    "regularized": Case(regularized=True),
}


def train(case: Case) -> list[dict[str, dict]]:
    """Return state of model and discriminator and the metrics after each step, the same on every rank.

    Each step takes other images and another seed, but starts from the same weights: in a longer run some row comes so
    close to two codes, or some activation to 0, that a rounding decides it, and weights then differ by 1e-4.
    """
    device = torch.device("cpu")
    torch.manual_seed(0)
    quantizer = RegularizedQuantizer(16, 4, prior_scope="image" if case.by_image else "global", prior_weight=0.5)
    if case.quantizer != "reg-vq":
        entropy = {} if case.quantizer == "vq-vae" else {"entropy_weight": 1.0}
        quantizer = QUANTIZERS[case.quantizer](16, 4, **entropy)
    model = VQGAN(quantizer, image_size=16, ch=8, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(), z_channels=4)
    discriminator = PatchDiscriminator(filters=4, num_layers=1, norm="group")
    features = VGGFeatures("vgg16", ("relu1_2", "relu2_2"))
    contrastive = ProbabilisticContrastiveLoss(num_patches=16)
    loss = ReconstructionLoss(features, LPIPS(features), contrastive, contrastive_weight=0.1)
    # Traced as one graph with its collectives; generating code for it would take minutes.
    with patch.object(torch, "compile", functools.partial(torch.compile, backend="aot_eager")):
        precision, lecam = Precision(device, None, ""), LeCAM(0.3) if case.regularized else None
        step = VQGANStep(model, discriminator, loss, precision, lecam=lecam, r1_weight=0.1, compile=case.compile)
    optimizers = [torch.optim.SGD(module.parameters(), lr=1e-2) for module in (model, discriminator)]
    generator = torch.Generator().manual_seed(1)
    modules = {"model": model, "discriminator": discriminator}
    start = {name: copy.deepcopy(module.state_dict()) for name, module in modules.items()}
    results: list[dict[str, dict]] = []
    for number in range(STEPS):
        for name, module in modules.items():
            module.load_state_dict(start[name])
        images = torch.rand(BATCH, 3, 16, 16, generator=generator) * 2 - 1
        size = BATCH // world_size()
        mine = images[rank() * size : (rank() + 1) * size]
        for k, part in enumerate(mine.chunk(case.parts)):
            metrics, _ = step(
                part,
                torch.tensor(number),
                first_image=torch.tensor(rank() * size + k * len(part)),
                adversarial=number > 0 and not case.by_image,
                penalize=case.regularized and number != 2,
                loss_scale=1 / case.parts,
                synchronize=k == case.parts - 1,
            )
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        results.append({name: copy.deepcopy(module.state_dict()) for name, module in modules.items()})
        results[-1]["lecam"] = copy.deepcopy(lecam.state_dict()) if lecam else {}
        results[-1]["metrics"] = {name: float(mean_over_ranks(value.float())) for name, value in metrics.items()}
    return results


def main() -> None:
    torch.set_num_threads(1)
    with process_group(torch.device("cpu")):
        for name, case in CASES.items():
            results = train(case)
            if rank() == 0:
                torch.save(results, Path(sys.argv[1]) / f"{name}.pt")


if __name__ == "__main__":
    main()
