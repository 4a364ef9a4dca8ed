"""Reproduce a table or a sweep of the paper: every row from training to metrics.

    python train/paper.py table2 --fid-features random-vgg16 --amp           # embedded scenes, tiny: a CPU will do
    python train/paper.py codebook-size --fid-features vgg16:vgg16.pth --perceptual-weights vgg16.pth --seeds 0 1 2
    python train/paper.py table1 --preset ade20k --scale full --data ADE20K/ --processes 4 --compile --amp

The same command goes on where it was stopped; rows that are done are not run again. --out, by default a folder in
runs/paper, gets the table beside the paper's numbers as Markdown, CSV and JSON, the figures, and in runs/ all that was
trained.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: threads that spin slow down shared cores

from functools import partial
from pathlib import Path

from regvq_fast.config import run_script
from regvq_fast.paper import PaperConfig, reproduce

if __name__ == "__main__":
    run_script(
        PaperConfig,
        partial(reproduce, scripts=Path(__file__).resolve().parent),
        description=str(__doc__),
        stopped="stopped; the same command goes on from there",
    )
