"""Some training steps on one or more ranks; run by test_ranks.py. Rank 0 writes weights and numbers.

python train_on_ranks.py OUT [--quantizer vq-vae] [--by-image] [--parts 2] [--compile]
python -m torch.distributed.run --nproc-per-node 2 train_on_ranks.py OUT ...
"""

import argparse
import functools

import torch

from regvq_fast.losses import LPIPS, ProbabilisticContrastiveLoss, ReconstructionLoss
from regvq_fast.models import VQGAN, PatchDiscriminator, VGGFeatures
from regvq_fast.precision import Precision
from regvq_fast.quantizers import EMAQuantizer, RegularizedQuantizer
from regvq_fast.ranks import mean_over_ranks, num_ranks, process_group, rank
from regvq_fast.training.step import VQGANStep

BATCH, STEPS = 8, 5


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    parser.add_argument("--quantizer", default="reg-vq")
    parser.add_argument("--by-image", action="store_true", help="only losses that are means over images")
    parser.add_argument("--parts", type=int, default=1)
    parser.add_argument("--compile", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.compile:  # traced as one graph with its collectives; generating code for it would take minutes
        torch.compile = functools.partial(torch.compile, backend="aot_eager")
    device = torch.device("cpu")
    with process_group(device):
        torch.manual_seed(0)
        quantizer = RegularizedQuantizer(
            16, 4, prior_scope="image" if arguments.by_image else "global", prior_weight=0.5
        )
        if arguments.quantizer == "vq-vae":
            quantizer = EMAQuantizer(16, 4)
        model = VQGAN(
            quantizer, image_size=16, ch=8, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(), z_channels=4
        )
        discriminator = PatchDiscriminator(filters=4, num_layers=1, norm="group")
        features = VGGFeatures("vgg16", ("relu1_2", "relu2_2"))
        contrastive = ProbabilisticContrastiveLoss(num_patches=16)
        loss = ReconstructionLoss(features, LPIPS(features), contrastive, contrastive_weight=0.1)
        step = VQGANStep(model, discriminator, loss, Precision(device, None, ""), compile=arguments.compile)
        optimizers = [torch.optim.SGD(module.parameters(), lr=1e-2) for module in (model, discriminator)]
        generator = torch.Generator().manual_seed(1)
        numbers = []
        for number in range(STEPS):
            images = torch.rand(BATCH, 3, 16, 16, generator=generator) * 2 - 1
            size = BATCH // num_ranks()
            mine = images[rank() * size : (rank() + 1) * size]
            for k, part in enumerate(mine.chunk(arguments.parts)):
                metrics, _ = step(
                    part,
                    torch.tensor(number),
                    first_image=torch.tensor(rank() * size + k * len(part)),
                    adversarial=number > 0 and not arguments.by_image,
                    loss_scale=1 / arguments.parts,
                    synchronize=k == arguments.parts - 1,
                )
            numbers.append({name: float(mean_over_ranks(value.float())) for name, value in metrics.items()})
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        if rank() == 0:
            torch.save([model.state_dict(), discriminator.state_dict(), numbers], arguments.out)


if __name__ == "__main__":
    main()
