"""Numbers that a run prints have labels and units."""

import pytest

from regvq_fast.number_formats import duration, evaluation_items, progress_items, result


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(2.73, "2.7 s"), (59.96, "1 min 00 s"), (252.4, "4 min 12 s"), (3599.7, "1 h 00 min"), (11_100, "3 h 05 min")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("name", "value", "printed"),
    [
        ("quantizer", "reg-vq", ("quantizer", "reg-vq")),
        ("psnr", 21.14, ("PSNR", "21.1 dB")),
        ("psnr", float("inf"), ("PSNR", "inf dB")),
        ("ssim", 0.5312, ("SSIM", "0.531")),
        ("utilization", 1.0, ("utilization", "100 %")),
        ("utilization", 4095 / 4096, ("utilization", "99.9 %")),
        ("utilization", 0.125, ("utilization", "12.5 %")),
        ("perplexity", 232.8, ("perplexity", "233 of 1,024")),
        ("loss (nats a token)", 4.3211, ("loss", "4.321 nats a token")),
        ("agreement of samples", 0.5, ("agreement of samples", "50 %")),
        ("images", 1200, ("validation images", "1,200")),
        ("images/s", 23.44, ("speed", "23.4 images/s")),
        ("images/s", 1234.5, ("speed", "1,234 images/s")),
        ("peak memory (GiB)", 1.234, ("peak memory", "1.23 GiB")),
        ("minutes", 4.2, ("time", "4 min 12 s")),
        ("minutes since step 30", 0.5, ("time since step 30", "30.0 s")),
        ("perceptual distance (random VGG-16)", 0.123456, ("perceptual distance (random VGG-16)", "0.1235")),
        ("unreadable images", 3, ("unreadable images", "3")),
    ],
)
def test_results(name, value, printed):
    assert result(name, value, num_codes=1024) == printed


def test_the_numbers_of_a_record_that_are_shown():
    record = {"kl": 0.1, "mfu": 0.31, "lr": 1e-4, "images_per_second": 12.34, "loss": 0.5, "not_finite": "loss"}
    assert progress_items(record) == ["loss 0.500", "12.3 images/s", "kl 0.10", "MFU 31 %"]


def test_the_numbers_of_an_evaluation_that_are_shown():
    assert evaluation_items({"loss": 4.3211, "images": 10}) == ["loss 4.321 nats a token"]
    values = {"psnr": 20.31, "ssim": 0.5312, "perceptual": 0.1, "utilization": 1.0, "perplexity": 232.8, "images": 5}
    assert evaluation_items(values, 256) == [
        "PSNR 20.3 dB",
        "SSIM 0.531",
        "utilization 100 %",
        "perplexity 233 of 256",
    ]
