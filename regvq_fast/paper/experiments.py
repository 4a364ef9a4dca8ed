"""Experiments of the paper: the rows of Table 1 and Table 2, the masking ratios and the codebook sizes.

A row is a tokenizer, described by flags of ``regvq train vq`` on top of a preset. Rows with the same tokenizer have the
same key, so that experiments share its run. Published numbers are from the paper's Tables 1 and 2. The study of
quantizers, which is not in the paper, is in :mod:`regvq_fast.paper.study`.
"""

from typing import Literal

from regvq_fast.config import PresetName
from regvq_fast.paper.rows import Experiment, Published, Recipe, Row, Scale
from regvq_fast.paper.study import STUDY, TUNING
from regvq_fast.priors.registry import PRIORS, PriorName

ExperimentName = Literal["table1", "table2", "masking", "codebook-size", "quantizers", "tuning"]


PUBLISHED_DATASETS: dict[str, str] = {
    "ade20k": "ADE20K",
    "celebahq": "CelebA-HQ",
    "cub200": "CUB-200",
    "coco": "MS-COCO",
}


def published_dataset(preset: PresetName) -> str:
    """Return the data set whose published numbers appear beside a preset's: its own; for the scenes, ADE20K."""
    return preset if preset in PUBLISHED_DATASETS else "ade20k"


_BASELINE = ("--contrastive", "none")
_VQ_GAN = ("--quantizer", "vq-gan", *_BASELINE)
# Reconstruction and commitment losses only, as in van den Oord et al.: no perceptual loss, no discriminator.
_VQ_VAE = ("--quantizer", "vq-vae", *_BASELINE, "--perceptual-weight", "0", "--disc-start", "None")


def _on_all(*rows: tuple[float, float, float]) -> dict[str, Published]:
    return {name: Published(*numbers) for name, numbers in zip(PUBLISHED_DATASETS, rows, strict=True)}


_TABLE_1 = (
    Row(
        "VQ-VAE",
        "vq-vae",
        _VQ_VAE,
        _on_all((49.21, 19.95, 60.29), (28.38, 23.39, 39.57), (20.89, 21.07, 26.32), (32.48, 19.12, 38.84)),
    ),
    Row(
        "VQ-GAN",
        "vq-gan",
        _VQ_GAN,
        _on_all((28.17, 18.89, 38.53), (12.74, 22.44, 17.42), (13.49, 20.88, 17.43), (18.58, 18.86, 23.75)),
    ),
    Row(
        "Gumbel-VQ",
        "gumbel-vq",
        ("--quantizer", "gumbel-vq", *_BASELINE),
        _on_all((26.42, 18.08, 37.51), (12.03, 20.92, 16.78), (13.25, 20.06, 16.93), (16.97, 18.43, 22.21)),
    ),
    Row(
        "Reg-VQ",
        "reg-vq",
        (),
        _on_all((23.69, 18.44, 34.47), (10.09, 22.05, 15.34), (10.84, 20.39, 14.14), (13.76, 18.64, 19.91)),
    ),
)

_TABLE_2 = (
    Row("baseline (VQ-GAN)", "vq-gan", _VQ_GAN, {"ade20k": Published(28.17, 18.89, 38.53)}),
    Row(
        "+ PriorReg",
        "reg-vq-mask-0-no-contrast",
        ("--mask-ratio", "0", "--contrastive", "none"),
        {"ade20k": Published(25.92, 18.98, 36.57)},
    ),
    Row("+ MaskReg", "reg-vq-no-contrast", ("--contrastive", "none"), {"ade20k": Published(25.11, 18.56, 35.03)}),
    Row("+ CL", "reg-vq-cl", ("--contrastive", "cl"), {"ade20k": Published(24.21, 18.49, 34.91)}),
    Row("+ PCL instead of CL", "reg-vq", (), {"ade20k": Published(23.69, 18.44, 34.47)}),
    Row("+ PCL on masked positions", "reg-vq-pcl-masked", ("--contrastive-region", "masked")),
)


def _masking(*ratios: float, more: tuple[str, ...] = (), suffix: str = "") -> tuple[Row, ...]:
    """Return rows of Reg-VQ; the preset's ratio has the key of the tables."""
    return tuple(
        Row(
            f"{ratio:.0%} masked",
            ("reg-vq" if ratio == 0.4 else f"reg-vq-mask-{ratio:g}") + suffix,
            (*(() if ratio == 0.4 else ("--mask-ratio", f"{ratio:g}")), *more),
            x=ratio,
            series="Reg-VQ",
        )
        for ratio in ratios
    )


def _codebook_sizes(
    *sizes: int, vq_gan: str, reg_vq: str, more: tuple[str, ...], ours: tuple[str, ...], base: int | None = None
) -> tuple[Row, ...]:
    """Return rows of both quantizers; with ``base`` codes, the preset's number, they have the keys of the tables."""
    series = (("VQ-GAN", vq_gan, _VQ_GAN), ("Reg-VQ", reg_vq, ours))
    return tuple(
        Row(
            f"{name}, {n} codes",
            key if n == base else f"{key}-{n}",
            (*flags, *more) if n == base else (*flags, *more, "--num-codes", str(n)),
            x=n,
            series=name,
        )
        for name, key, flags in series
        for n in sizes
    )


def _at_any_scale(rows: tuple[Row, ...]) -> dict[Scale, tuple[Row, ...]]:
    return {"tiny": rows, "full": rows}


EXPERIMENTS: dict[ExperimentName, Experiment] = {
    "table1": Experiment("Table 1: quantizers", _at_any_scale(_TABLE_1), with_prior=True),
    "table2": Experiment("Table 2: ablation", _at_any_scale(_TABLE_2), with_prior=True),
    "masking": Experiment(
        "Masking ratio",
        {
            # The contrastive loss is off, since its weights depend on the mask. Two rows are those of Table 2.
            "tiny": _masking(0.0, 0.2, 0.4, 0.6, 1.0, more=_BASELINE, suffix="-no-contrast"),
            "full": _masking(0.0, 0.2, 0.4, 0.6, 0.8, 1.0),
        },
        with_prior=False,
        axis="fraction of stochastic positions",
    ),
    "codebook-size": Experiment(
        "Codebook size",
        {
            # With 16 x 16 tokens, each of 4096 codes is selected 300 times on average in 300 steps. With the default KL
            # weight of 0.1, 97.8 % of them were in use by then (docs/sweeps.md).
            "tiny": _codebook_sizes(
                *(256, 1024, 4096),
                vq_gan="vq-gan-f4",
                reg_vq="reg-vq-f4-kl-0.3",
                more=("--image-size", "64", "--steps", "300"),
                ours=("--kl-weight", "0.3"),
            ),
            "full": _codebook_sizes(1024, 4096, 8192, vq_gan="vq-gan", reg_vq="reg-vq", more=(), ours=(), base=1024),
        },
        with_prior=False,
        axis="codes N",
    ),
    "quantizers": STUDY,
    "tuning": TUNING,
}


def prior_of(preset: PresetName) -> PriorName:
    """Return the prior that the paper trains on this data: the first one with a preset for it."""
    return next(name for name, prior in PRIORS.items() if preset in prior.presets)


def recipe(preset: PresetName, scale: Scale) -> Recipe:
    """Return the flags of a preset at a scale: tiny, the scenes' preset at 32 px on any data; or full, as the paper."""
    if scale == "tiny":
        # Table 2 should take at most 40 minutes on two CPU cores. At 64 px that allows 300 steps, after which most runs
        # have not separated white from red, and the seed matters more than the row (docs/failed-ideas.md).
        prior: tuple[str, ...] = ("--steps", "600", "--eval-every", "200")
        return Recipe(
            "scenes",
            # regvq evaluate has all validation images.
            ("--image-size", "32", "--ch-mult", "1", "1", "2", "--steps", "600", "--val-images", "128"),
            ("--views", "1", "--val-images", "256"),
            prior,
            1024,
        )
    if preset != "scenes":
        return Recipe(preset, (), (), (), None)
    # For a GPU: the scenes at a size that shows textures, with the discriminator.
    prior = ("--steps", "20000", "--width", "512", "--depth", "12", "--heads", "8", "--lr", "3e-4")
    return Recipe(
        "scenes",
        (
            *("--image-size", "128", "--num-codes", "1024", "--code-dim", "64", "--ch", "64", "--num-res-blocks", "2"),
            *("--steps", "20000", "--lr", "3e-4", "--warmup-steps", "500", "--disc-start", "8000"),
            *("--val-images", "5000"),
        ),
        ("--views", "4", "--val-images", "5000"),
        prior,
        5000,
    )
