"""The study of quantizers: all of them on equal terms, at four codebook sizes, on any data.

Equal are the autoencoder, its steps, batch and losses, and the prior. The contrastive loss of the paper is left out: it
is a loss of images, which any quantizer could have.
"""

from regvq_fast.paper.rows import Experiment, Recipe, Row, Scale

SIZES = (256, 1024, 4096, 16384)

QUANTIZER_FLAGS: dict[str, tuple[str, ...]] = {
    "Reg-VQ": ("--quantizer", "reg-vq"),
    "VQ-GAN": ("--quantizer", "vq-gan"),
    "VQ-GAN, rotation trick": ("--quantizer", "vq-gan", "--rotation-trick"),
    "VQ-VAE": ("--quantizer", "vq-vae", "--kmeans-init"),
    "Gumbel-VQ": ("--quantizer", "gumbel-vq"),
    "FSQ": ("--quantizer", "fsq"),
    "LFQ": ("--quantizer", "lfq"),
    "BSQ": ("--quantizer", "bsq"),
    "SimVQ": ("--quantizer", "simvq"),
    "IBQ": ("--quantizer", "ibq"),
}
"""Flags of each quantizer, with its own settings where the defaults are not those of its authors or of a sweep."""


def _rows() -> tuple[Row, ...]:
    """Return all quantizers with the least codes, then with more."""
    return tuple(
        Row(
            f"{name}, {size} codes",
            f"study-{name.lower().replace(', ', '-').replace(' ', '-')}-{size}",
            (*flags, "--num-codes", str(size)),
            x=size,
            series=name,
        )
        for size in SIZES
        for name, flags in QUANTIZER_FLAGS.items()
    )


def _recipe(scale: Scale, scenes: bool) -> Recipe:
    """Return the settings: at the tiny scale pixel losses alone, as no perceptual network comes with the package."""
    whole = ("--crop", "center", "--no-flip")  # what the token cache has; a face or a letter is not its mirror image
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
