"""Models of a few weights, small images, and a feature network of a few numbers."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regvq_fast.data.loading import collate
from regvq_fast.data.transforms import to_float
from regvq_fast.evaluation.feature_nets import FeatureNet
from regvq_fast.models import VQGAN
from regvq_fast.quantizers import NearestQuantizer, Quantizer
from regvq_fast.scenes import ScenesDataset


def tiny_vqgan(quantizer: Quantizer | None = None, **changes: Any) -> VQGAN:
    """A VQ-GAN of 8 channels and 8 x 8 tokens of 16 pixels; 4 codes of 4 channels unless a quantizer is given."""
    sizes = {"image_size": 16, "ch": 8, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": (), "z_channels": 4}
    return VQGAN(quantizer or NearestQuantizer(4, 4), **(sizes | changes))


def scenes_batch(count: int, split: str = "val") -> dict[str, Any]:
    """The first scenes of a split, of 16 pixels."""
    scenes = ScenesDataset(split, 16, length=count)
    return collate([scenes[k] for k in range(count)])


def training_images() -> Tensor:
    """The first twelve training scenes, of 16 pixels, in [-1, 1]."""
    return to_float(scenes_batch(12, "train")["image"])


def noise_images(count: int, seed: int, low: int = 0, size: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


def tiny_tokenizer(num_codes: int = 32, seed: int = 0) -> VQGAN:
    """A VQ-GAN whose codes are spread, so that images of scenes get several."""
    torch.manual_seed(seed)
    model = tiny_vqgan(NearestQuantizer(num_codes, 4), z_channels=8)
    model.initialize_quantizer(scenes_batch(8, "train")["image"] / 127.5 - 1)
    nn.init.normal_(model.quantize.embedding.weight)
    return model.eval()


class TinyNet(FeatureNet):
    """Mixed colours of the quarters of an image, K = 8."""

    name = "tiny"
    num_features = 8
    min_size = 4

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.mix = nn.Linear(12, 8)
        generator = torch.Generator().manual_seed(seed)
        nn.init.normal_(self.mix.weight, std=1 / 64, generator=generator)
        nn.init.zeros_(self.mix.bias)
        self.seen = 0
        self._finish()

    def features(self, images: Tensor) -> Tensor:
        self.seen += len(images)
        return self.mix(F.adaptive_avg_pool2d(images.float(), 2).flatten(1))
