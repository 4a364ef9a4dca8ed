"""Sample images from a trained prior.

    python train/sample.py --run runs/ar --out samples                          # maps of the validation split
    python train/sample.py --run runs/ar --out samples --map map.png --top-p 0.95 --guidance 2
    python train/sample.py --run runs/diffusion --out samples --text "grass on the left and bricks on the right"
    python train/sample.py --run runs/ar --out samples --map map.png --edit photo.png --mask mask.png

--out gets each image as NUMBER.png, and grid.png: images under what they are conditioned on.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: threads that spin slow down shared cores

from regvq_fast.cli.sample import SampleConfig, generate
from regvq_fast.config import run_script

if __name__ == "__main__":
    run_script(SampleConfig, generate, str(__doc__), stopped="stopped; the images so far are in {out}")
