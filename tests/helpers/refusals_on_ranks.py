"""What the ranks of one run say to runs that can't begin, though only one rank has found out. Each writes RANK.json.

python -m torch.distributed.run --nproc-per-node 2 refusals_on_ranks.py FOLDER

FOLDER/rank-0.safetensors and FOLDER/rank-0/ are there for rank 0 alone.
"""

import functools
import json
import sys
import time
from pathlib import Path
from unittest.mock import patch

import torch

from regvq_fast.config import VQGANConfig, override
from regvq_fast.models import VGGFeatures
from regvq_fast.ranks import process_group, rank
from regvq_fast.training import build
from regvq_fast.training.opening import open_run
from regvq_fast.training.vqgan_recipe import VQGANRecipe

TINY = override(
    VQGANConfig(), image_size=32, ch=8, ch_mult=(1, 2), z_channels=8, code_dim=8, num_codes=16, steps=2, batch_size=4,
    device="cpu", disc_filters=4, quantizer="vq-gan", contrastive="none",
)  # fmt: skip


def load(net: str, weights: Path | None, folder: Path, stalled: bool) -> VGGFeatures:
    """What downloads into a cache that the ranks share; where it is ``stalled`` only rank 0 gets weights."""
    if rank() == 0:
        time.sleep(0.5)
        (folder / "cache").touch()
    elif not (folder / "cache").exists():
        raise OSError("it is not there yet")
    features = VGGFeatures("vgg16")
    features.pretrained = features.imagenet = rank() == 0 or not stalled
    return features


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    said = {}
    with process_group(torch.device("cpu")):
        cases: dict[str, dict[str, object]] = {
            "weights": {"perceptual_weights": folder / f"rank-{rank()}.safetensors"},
            "data": {"perceptual_weight": 0.0, "data": folder / f"rank-{rank()}"},
            "stalled": {},
            "none": {},
        }
        for name, changes in cases.items():
            config = override(TINY, out=folder / name, **changes)
            downloading = functools.partial(load, folder=folder, stalled=name == "stalled")
            with patch.object(build, "load_vgg_features", build.load_vgg_features if changes else downloading):
                try:
                    open_run(VQGANRecipe, config)
                except (ValueError, OSError) as error:
                    said[name] = f"{type(error).__name__}: {error}"
        (folder / f"{rank()}.json").write_text(json.dumps(said))


if __name__ == "__main__":
    main()
