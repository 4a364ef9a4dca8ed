"""Train an image tokenizer: a VQ-GAN with Reg-VQ, or a baseline.

    python train/vq.py --compile --amp           # embedded scenes; minutes on a CPU
    python train/vq.py --data photos/ --image-size 128 --steps 20000 --compile --amp
    torchrun --nproc-per-node 4 train/vq.py --preset ade20k --data ADE20K/ --amp
    python train/vq.py --resume --out runs/NAME  # continue a run that stopped

A run leaves its configuration, metrics, images, checkpoints and weights in --out.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: threads that spin slow down shared cores

from regvq_fast.cli.train import train
from regvq_fast.config import VQGAN_PRESETS
from regvq_fast.training.vqgan_recipe import VQGANRecipe

if __name__ == "__main__":
    train(VQGANRecipe, VQGAN_PRESETS, description=str(__doc__))
