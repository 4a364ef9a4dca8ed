"""The study of quantizers: all of them on equal terms, at four codebook sizes, on any data.

They share the autoencoder, its steps, batch size and losses, and the prior. Each was tuned over as many settings. The
paper's contrastive loss is off, since it could be combined with any quantizer.
"""

import math

from regvq_fast.paper.rows import Experiment, Recipe, Row, Scale

SIZES = (256, 1024, 4096, 16384)
TUNED_SIZE = 1024
"""Codebook size of the tuning."""

QUANTIZER_FLAGS: dict[str, str] = {
    "Reg-VQ": "--quantizer reg-vq",
    "VQ-GAN": "--quantizer vq-gan",
    "VQ-GAN, rotation trick": "--quantizer vq-gan --rotation-trick",
    "VQ-VAE": "--quantizer vq-vae --kmeans-init",
    "Gumbel-VQ": "--quantizer gumbel-vq",
    "FSQ": "--quantizer fsq",
    "LFQ": "--quantizer lfq",
    "BSQ": "--quantizer bsq",
    "SimVQ": "--quantizer simvq",
    "IBQ": "--quantizer ibq",
}
"""Flags that select each quantizer."""

_NEAREST = (
    "--commitment 1",
    "--commitment 0.05",
    "--code-dim 8",
    "--code-dim 8 --commitment 1",
    "--code-dim 8 --commitment 0.05",
    "--code-dim 16",
)

TRIALS: dict[str, tuple[str, ...]] = {
    "Reg-VQ": (
        "--kl-weight 0.03",
        "--perturbed 0.9 --kl-weight 0.03",
        "--perturbed 0.9 --kl-weight 0.01",
        "--perturbed 0.9 --kl-weight 0.03 --code-dim 8",
        "--perturbed 0.9 --kl-weight 0.03 --code-dim 16",
        "--perturbed 0.9 --kl-weight 0.03 --mask-ratio 0.2",
    ),
    "VQ-GAN": _NEAREST,
    "VQ-GAN, rotation trick": _NEAREST,
    "VQ-VAE": (
        "--codebook-decay 0.95",
        "--codebook-decay 0.9",
        "--commitment 1",
        "--commitment 0.05",
        "--code-dim 8",
        "--code-dim 16",
    ),
    "Gumbel-VQ": (
        "--kl-weight 0.005",
        "--kl-weight 0.05",
        "--tau-end 0.5",
        "--tau-end 0.5 --kl-weight 0.005",
        "--code-dim 8",
        "--code-dim 16",
    ),
    "FSQ": (
        "--levels 4 4 4 4 4",
        "--levels 10 10 10",
        "--levels 32 32",
        "--levels 6 6 6 5",
        "--levels 3 3 3 3 4 3",
        "--levels 16 8 8",
    ),
    "LFQ": (
        "--entropy-weight 0.02",
        "--entropy-weight 0.02 --temperature 0.1",
        "--temperature 0.1",
        "--temperature 1",
        "--entropy-weight 0.02 --temperature 1",
        "--commitment 1",
    ),
    "BSQ": (
        "--entropy-weight 0.02",
        "--entropy-weight 0.3",
        "--entropy-weight 0.02 --temperature 0.1",
        "--temperature 0.1",
        "--commitment 0.25",
        "--commitment 0.25 --entropy-weight 0.02",
    ),
    "SimVQ": (
        "--commitment 1",
        "--commitment 0.05",
        "--no-rotation-trick",
        "--code-dim 8",
        "--code-dim 8 --commitment 0.05",
        "--code-dim 16",
    ),
    "IBQ": (
        "--entropy-weight 0",
        "--entropy-temperature 0.1",
        "--entropy-temperature 1",
        "--codebook-weight 1",
        "--code-dim 8",
        "--code-dim 16",
    ),
}
"""Six settings for each quantizer to be tuned over, besides its defaults."""

CHOSEN: dict[str, str] = {
    "Reg-VQ": "--perturbed 0.9 --kl-weight 0.03 --code-dim 8",
    "VQ-GAN": "--commitment 1",
    "VQ-GAN, rotation trick": "--commitment 0.05",
    "VQ-VAE": "--codebook-decay 0.9",
    "Gumbel-VQ": "--tau-end 0.5",
    "FSQ": "--levels 4 4 4 4 4",
    "LFQ": "--temperature 0.1",
    "BSQ": "--entropy-weight 0.3",
    "SimVQ": "--code-dim 8 --commitment 0.05",
    "IBQ": "--entropy-temperature 0.1",
}
"""Settings of the study: of those with a Fréchet distance within 5 % of the best one, the one that uses most codes."""


def _chosen(name: str, size: int) -> str:
    if name == "FSQ":  # four levels per channel, with more or fewer channels
        return "--levels" + " 4" * round(math.log(size, 4))
    return CHOSEN.get(name, "")


def _row(name: str, size: int, settings: str, label: str) -> Row:
    """Return a row; the same settings and size have the same key, and so one run, in both experiments."""
    words = f"{name} {size} {settings}".lower().replace(",", "").split()
    return Row(
        f"{name}, {label}",
        "-".join(["study", *(word.strip("-") for word in words)]),
        (*QUANTIZER_FLAGS[name].split(), "--num-codes", str(size), *settings.split()),
        x=size,
        series=name,
    )


def _rows() -> tuple[Row, ...]:
    """Return the rows of all quantizers, by ascending codebook size."""
    return tuple(_row(name, size, _chosen(name, size), f"{size} codes") for size in SIZES for name in QUANTIZER_FLAGS)


def _trials() -> tuple[Row, ...]:
    """Return the rows of all quantizers with their defaults, then with each of the settings to be tuned over."""
    return tuple(
        _row(name, TUNED_SIZE, trial, trial or "defaults")
        for trials in zip(*(("", *trials) for trials in TRIALS.values()), strict=True)
        for name, trial in zip(TRIALS, trials, strict=True)
    )


def _recipe(scale: Scale, scenes: bool) -> Recipe:
    """Return the settings. The tiny scale uses pixel losses only: the package includes no perceptual network."""
    whole = ("--crop", "center", "--no-flip")  # as in the token cache; a face or a letter is not its mirror image
    if scale == "tiny":
        return Recipe(
            "scenes",
            (
                *("--image-size", "32", "--ch", "16", "--steps", "500", "--batch-size", "8", *whole),
                *("--val-images", "128"),
                *("--perceptual-weight", "0", "--contrastive", "none", "--log-every", "20", "--image-every", "1000"),
            ),
            ("--views", "1", "--val-images", "256", *(("--scenes", "2048") if scenes else ("--no-flip",))),
            (
                *("--steps", "400", "--batch-size", "8", "--width", "96", "--depth", "3", "--heads", "4"),
                *("--eval-every", "100", "--image-every", "1000"),
            ),
            256,
            unconditional=True,
        )
    return Recipe(
        "scenes",
        (
            *("--image-size", "128", "--code-dim", "64", "--ch", "64", "--ch-mult", "1", "1", "2", "4"),
            *("--num-res-blocks", "2", "--steps", "20000", "--lr", "3e-4", "--warmup-steps", "500", *whole),
            *("--contrastive", "none", "--disc-start", "8000", "--val-images", "5000"),
        ),
        ("--views", "1", "--val-images", "5000", *(("--scenes", "65536") if scenes else ("--no-flip",))),
        (
            *("--steps", "20000", "--width", "512", "--depth", "12", "--heads", "8", "--lr", "3e-4"),
            *("--eval-every", "2000"),
        ),
        5000,
        unconditional=True,
    )


STUDY = Experiment(
    "Quantizers",
    {"tiny": _rows(), "full": _rows()},
    with_prior=True,
    axis="codes N",
    own_recipe=_recipe,
    with_costs=True,
    shown=1024,
)

TUNING = Experiment(
    f"Tuning of the quantizers, {TUNED_SIZE} codes",
    {"tiny": _trials(), "full": _trials()},
    with_prior=False,
    own_recipe=_recipe,
)
