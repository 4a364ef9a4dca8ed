import contextlib
import json
import math
from types import SimpleNamespace

import pytest
import torch
from skimage.metrics import structural_similarity
from torch import nn

from regvq_fast.data import to_float, to_uint8, validation_batches
from regvq_fast.evaluation.reconstruction_metrics import evaluate_reconstruction
from regvq_fast.scenes import ScenesDataset


class Distorting(nn.Module):
    """Stands for a tokenizer: a known distortion, and tokens that say which image they are of."""

    def __init__(self, distort):
        super().__init__()
        self.distort = distort
        self.seen = 0
        self.eval()

    def forward(self, images):
        tokens = torch.arange(self.seen, self.seen + len(images))[:, None, None].expand(-1, 2, 2)
        self.seen += len(images)
        return SimpleNamespace(reconstruction=self.distort(images), quantizer=SimpleNamespace(indices=tokens))


def batches_of(images, size):
    return [{"image": part} for part in images.split(size)]


def evaluate(distort, images, size=2, **options):
    return evaluate_reconstruction(Distorting(distort), batches_of(images, size), num_codes=8, device="cpu", **options)


@pytest.fixture(scope="module")
def images():
    dataset = ScenesDataset("val", 48, length=5)
    return torch.stack([dataset[index]["image"] for index in range(5)])


def test_psnr_by_hand_is_the_mean_of_the_images_own():
    images = torch.full((2, 3, 16, 16), 100, dtype=torch.uint8)
    offset = torch.tensor([10.0, 20.0]).view(2, 1, 1, 1)  # levels
    metrics = evaluate(lambda x: x + offset / 127.5, images)
    expected = sum(20 * math.log10(255 / levels) for levels in (10, 20)) / 2
    assert metrics.psnr == pytest.approx(expected, rel=1e-5)


def test_reconstructions_are_clamped_and_rounded_first():
    images = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 16, 16)
    assert evaluate(lambda x: x * 3 + 0.4 / 127.5, images).psnr == math.inf  # exact, once it is a PNG
    assert evaluate(lambda x: x * 0.9, images).psnr < 40


def test_ssim_against_scikit_image(images):
    def distort(x):
        return 0.7 * x + 0.1

    metrics = evaluate(distort, images)
    expected = [
        structural_similarity(
            original.permute(1, 2, 0).numpy(),
            to_uint8(distort(to_float(original))).permute(1, 2, 0).numpy(),
            channel_axis=2,
            gaussian_weights=True,
            use_sample_covariance=False,
            data_range=255,
        )
        for original in images
    ]
    assert metrics.ssim == pytest.approx(sum(expected) / 5, abs=1e-5)
    assert evaluate(lambda x: x, images).ssim == pytest.approx(1)


def test_partial_batches_weigh_by_their_images(images):
    def distort(x):
        return x + 0.2 * x.mean(dim=(1, 2, 3), keepdim=True)

    whole, split = evaluate(distort, images, 5), evaluate(distort, images, 3)
    for name, value in whole.scalars().items():
        assert split.scalars()[name] == pytest.approx(value, rel=1e-5), name


def test_codes_are_counted_over_all_images(images):
    metrics = evaluate(lambda x: x, images)
    assert metrics.images == 5
    assert metrics.code_counts.tolist() == [4, 4, 4, 4, 4, 0, 0, 0]
    assert metrics.utilization == 5 / 8
    assert metrics.perplexity == pytest.approx(5)
    assert metrics.position_entropy.shape == (2, 2)


def test_a_perceptual_distance_of_any_trailing_shape(images):
    def distance(reconstruction, original):
        assert reconstruction.dtype == original.dtype == torch.float32
        return (reconstruction - original).abs().mean(dim=(1, 2, 3), keepdim=True)

    metrics = evaluate(lambda x: x.clamp(-0.5, 0.5).bfloat16(), images, 3, perceptual=distance)
    rounded = to_float(to_uint8(to_float(images).clamp(-0.5, 0.5).bfloat16()))
    assert metrics.perceptual == pytest.approx((rounded - to_float(images)).abs().mean().item(), rel=1e-5)
    json.dumps(metrics.scalars())
    assert metrics.scalars()["perceptual"] == metrics.perceptual
    assert "perceptual" not in evaluate(lambda x: x, images).scalars()


def test_a_broken_reconstruction_is_not_scored(images):
    metrics = evaluate(lambda x: torch.where(x == x.max(), torch.nan, x), images)
    assert math.isnan(metrics.psnr)
    assert math.isnan(metrics.ssim)


def test_autocast_is_entered_for_each_batch_and_no_gradient_is_kept(images):
    entered = []

    class Context(contextlib.AbstractContextManager):
        def __enter__(self):
            entered.append(torch.is_grad_enabled())

        def __exit__(self, *error):
            return None

    evaluate(lambda x: x, images, 2, autocast=Context())
    assert entered == [False] * 3


def test_progress_counts_images(images):
    done = []
    evaluate(lambda x: x, images, 2, progress=done.append)
    assert done == [2, 4, 5]


def test_takes_the_loaders_batches():
    loader = validation_batches(ScenesDataset("val", 16, length=5), 2)
    metrics = evaluate_reconstruction(Distorting(lambda x: x), loader, num_codes=5, device="cpu")
    assert (metrics.images, metrics.utilization) == (5, 1)


def test_bad_input(images):
    with pytest.raises(ValueError, match="training mode"):
        evaluate_reconstruction(Distorting(lambda x: x).train(), [], num_codes=8, device="cpu")
    with pytest.raises(ValueError, match=r"\b11 .*8 x 48"):
        evaluate(lambda x: x, images[:, :, :8])
    with pytest.raises(ValueError, match="no image"):
        evaluate_reconstruction(Distorting(lambda x: x), [], num_codes=8, device="cpu")
