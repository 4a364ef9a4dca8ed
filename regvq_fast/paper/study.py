"""The study of quantizers: all of them on equal terms, at four codebook sizes, on any data.

They share the autoencoder, its steps, batch size and losses, and the prior. The paper's contrastive loss is off, since
it could be combined with any quantizer.
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
"""Flags of each quantizer; settings are given where the defaults are neither the authors' nor from a sweep."""


def _rows() -> tuple[Row, ...]:
    """Return the rows of all quantizers, by ascending codebook size."""
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
