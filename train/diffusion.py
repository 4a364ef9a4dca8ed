"""Train the diffusion prior: VQ-Diffusion over the tokens of an image, given its caption.

    python train/diffusion.py --cache runs/tokens --compile --amp                # tokens of train/cache_tokens.py
    python train/diffusion.py --on-the-fly --tokenizer runs/vq --compile --amp   # tokens made in every step
    python train/diffusion.py --preset coco --cache COCO/tokens --compile --amp
    torchrun --nproc-per-node 4 train/diffusion.py --preset coco --cache COCO/tokens --compile --amp
    python train/diffusion.py --resume --out runs/NAME

A run leaves its resolved configuration, tokenizer, metrics, images, checkpoints and weights in --out (default:
runs/...); train/sample.py samples images from it.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: threads that spin slow down shared cores

from regvq_fast.cli.train import train
from regvq_fast.priors.diffusion.config import DIFFUSION_PRESETS
from regvq_fast.priors.diffusion.recipe import DiffusionRecipe

if __name__ == "__main__":
    train(DiffusionRecipe, DIFFUSION_PRESETS, description=str(__doc__))
