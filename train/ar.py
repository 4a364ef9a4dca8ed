"""Train the autoregressive prior: a transformer that samples the tokens of an image, given its semantic map.

    python train/ar.py --cache runs/tokens --compile --amp                # tokens of train/cache_tokens.py
    python train/ar.py --on-the-fly --tokenizer runs/vq --compile --amp   # tokens made in every step
    python train/ar.py --preset ade20k --cache ADE20K/tokens --compile --amp
    torchrun --nproc-per-node 4 train/ar.py --preset ade20k --cache ADE20K/tokens --compile --amp
    python train/ar.py --resume --out runs/NAME

A run leaves its resolved configuration, tokenizer, metrics, images, checkpoints and weights in --out (default:
runs/...); train/sample.py samples images from it.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: threads that spin slow down shared cores

from regvq_fast.cli.train import train
from regvq_fast.priors.autoregressive.config import AR_PRESETS
from regvq_fast.priors.autoregressive.recipe import ARRecipe

if __name__ == "__main__":
    train(ARRecipe, AR_PRESETS, description=str(__doc__))
