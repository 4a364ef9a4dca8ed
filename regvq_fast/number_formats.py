"""Labels and units of a run's numbers in its output; its files have the plain numbers."""

import re
from collections.abc import Callable, Mapping


def percent(fraction: float, form: str = ".3g") -> str:
    """Return a fraction as `12.5 %`; only 1 gives `100 %`."""
    return "99.9 %" if 0.9995 <= fraction < 1 else f"{100 * fraction:{form}} %"


def duration(seconds: float) -> str:
    """Return seconds as `2.7 s`, `4 min 12 s` or `3 h 05 min`."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min"


def speed(images_per_second: float) -> str:
    """Return a rate as `23.4 images/s`."""
    return f"{images_per_second:,.{0 if images_per_second >= 100 else 1}f} images/s"


Format = Callable[[float], str]

# In order of importance: a narrow terminal drops the last ones.
_PROGRESS: dict[str, tuple[str, Format]] = {
    "loss": ("loss", "{:.3f}".format),
    "l1": ("l1", "{:.3f}".format),
    "utilization": ("utilization", percent),
    "images_per_second": ("", speed),
    "perceptual": ("perceptual", "{:.3f}".format),
    "kl": ("kl", "{:.2f}".format),
    "lambda": ("lambda", "{:.2f}".format),
    "mfu": ("MFU", percent),
}
"""Label and format by the name in metrics.jsonl; other numbers are not shown."""

_RESULTS: dict[str, tuple[str, Format]] = {
    "psnr": ("PSNR", "{:.1f} dB".format),
    "ssim": ("SSIM", "{:.3f}".format),
    "utilization": ("utilization", percent),
    "perplexity": ("perplexity", "{:.0f}".format),
    "loss": ("loss", "{:.3f} nats a token".format),
    "agreement": ("agreement", percent),
    "layout": ("layout", percent),
    "classes": ("classes", percent),
    "images": ("validation images", "{:,}".format),
    "parameters": ("parameters", "{:,}".format),
    "images/s": ("speed", speed),
    "peak memory": ("peak memory", "{:.3g} GiB".format),
    "minutes": ("time", lambda minutes: duration(60 * minutes)),
}
"""Label and format by the name in summary.json, up to " of ", " since " or an opening bracket."""
_EVALUATION = ("psnr", "ssim", "loss", "utilization", "perplexity")


def progress_items(values: Mapping[str, float | str]) -> list[str]:
    """Return the main numbers of a training record as texts such as `loss 0.123`, the most important first."""
    return [
        f"{label} {text(value)}".lstrip()
        for name, (label, text) in _PROGRESS.items()
        if not isinstance(value := values.get(name, ""), str)
    ]


def evaluation_items(values: Mapping[str, float], num_codes: int | None = None) -> list[str]:
    """Return the main numbers of an evaluation as texts such as `PSNR 21.1 dB`.

    Args:
        values: by their names in metrics.jsonl.
        num_codes: size of the codebook, for perplexity.
    """
    return [" ".join(result(name, values[name], num_codes)) for name in _EVALUATION if name in values]


def result(name: str, value: object, num_codes: int | None = None) -> tuple[str, str]:
    """Return the label of a number in summary.json and its text with the unit; other values keep their name."""
    base = re.split(r" of | since | \(", name)[0]
    if isinstance(value, str) or base not in _RESULTS:
        return name, f"{value:.4g}" if isinstance(value, float) else str(value)
    label, text = _RESULTS[base]
    scope = name.removeprefix(base)
    of_codes = f" of {num_codes:,}" if base == "perplexity" and num_codes else ""
    return label + ("" if scope.startswith(" (") else scope), text(value) + of_codes  # type: ignore[arg-type]
