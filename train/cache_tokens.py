"""Encode a data set once with a trained tokenizer: the priors train from its tokens.

    python train/cache_tokens.py --tokenizer runs/NAME --out cache/           # embedded scenes
    python train/cache_tokens.py --tokenizer runs/NAME --out cache/ --data photos/ --fields segmentation --amp
    torchrun --nproc-per-node 8 train/cache_tokens.py --tokenizer runs/NAME --out cache/ --data shards/ --amp

The cache holds the first --views epochs of the training stream and the validation split. The same command completes a
cache whose run was stopped.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: threads that spin slow down shared cores

from regvq_fast.cli.cache_tokens import CacheConfig, cache_tokens
from regvq_fast.config import run_script

if __name__ == "__main__":
    stopped = "stopped; the same command goes on from the shards that are done"
    run_script(CacheConfig, cache_tokens, str(__doc__), stopped=stopped)
