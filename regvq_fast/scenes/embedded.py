"""Models of the scenes that ship with the package: a tokenizer, and two priors over its tokens."""

from pathlib import Path

from regvq_fast.models.pretrained import WEIGHTS

FOLDER = Path(__file__).with_name("pretrained")
"""Folder with a folder for each model; the priors share the tokenizer beside them."""
EMBEDDED = {
    "tokenizer": "regvq train vq",
    "ar": "regvq train ar",
    "diffusion": "regvq train diffusion",
}
"""Commands that train these models, by the name of the model's folder."""


def embedded_model(name: str) -> Path:
    """Return the folder of an embedded model, as `Model.from_pretrained` reads it.

    Args:
        name: a key of `EMBEDDED`.

    Raises:
        ValueError: another name. FileNotFoundError: this copy of the package has no embedded models.
    """
    if name not in EMBEDDED:
        raise ValueError(f"the embedded models are {', '.join(EMBEDDED)}, not {name!r}")
    folder = FOLDER / name
    if not (folder / WEIGHTS).is_file():
        raise FileNotFoundError(
            f"{folder} is not there: this copy of the package has no embedded models; reinstall it, or train one with "
            f"`{EMBEDDED[name]}` and give its run"
        )
    return folder


def is_embedded(folder: Path) -> bool:
    """Return whether a folder belongs to an embedded model."""
    return folder.resolve().parent == FOLDER.resolve()
