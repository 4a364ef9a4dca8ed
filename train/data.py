"""Check the paper's data sets as their official archives unpack, and pack them into shards.

    python train/data.py verify --dataset cub200 --root data/               # which files exist, where to get the rest
    python train/data.py verify --root data/CUB_200_2011 --decode           # and can all of it be read?
    python train/data.py prepare --root data/CUB_200_2011 --out cub-shards  # resized, as tar files for --data

Training reads the archives' folders as they are: --data data/CUB_200_2011. docs/data.md has addresses, layouts, splits.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: threads that spin slow down shared cores

from regvq_fast.cli.data import DataCommand, manage_data
from regvq_fast.config import run_script

if __name__ == "__main__":
    run_script(DataCommand, manage_data, str(__doc__), stopped="stopped; nothing unfinished is left")
