"""Measure a trained tokenizer, and images sampled by a prior, over a whole validation split.

    python train/evaluate.py --run runs/vq                                    # PSNR, SSIM, LPIPS, codebook, FID[R]
    python train/evaluate.py --prior-run runs/ar --top-p 0.95                 # and FID[G] of images by the prior
    python train/evaluate.py --images samples --data photos --image-size 256  # FID[G] of images that are there
    python train/evaluate.py --run runs/vq --fid-features vgg16:vgg16.pth     # with other features, named as such

Writes evaluation.json: each number beside the protocol it was measured by.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: threads that spin slow down shared cores

from regvq_fast.cli.evaluate import EvaluateConfig, evaluate
from regvq_fast.config import run_script

if __name__ == "__main__":
    run_script(EvaluateConfig, evaluate, str(__doc__))
