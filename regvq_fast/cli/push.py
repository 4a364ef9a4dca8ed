"""The command ``regvq push``: publish a run on the Hugging Face Hub, with a model card."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from regvq_fast.config import run_command
from regvq_fast.console import say
from regvq_fast.evaluation.measurement import RESULTS
from regvq_fast.files import atomic_folder, check_new_folder
from regvq_fast.models.hub import CARD, PICTURES, HubName, check_name, publish
from regvq_fast.models.model import Model, read_model
from regvq_fast.models.pretrained import CONFIG, TOKENIZER, WEIGHTS, step_folders, to_json, with_manifest
from regvq_fast.models.vqgan import VQGAN
from regvq_fast.models.weights import weights_hash
from regvq_fast.priors.conditions import CONDITION_FLAGS
from regvq_fast.priors.registry import PRIORS, prior_of
from regvq_fast.settings import Section
from regvq_fast.version import __version__

USAGE = """Publish a run on the Hugging Face Hub, with a model card of its settings and measurements.

    regvq push --run runs/vq --to me/scenes-vq --out published   # a dry run
    regvq push --run runs/vq --to me/scenes-vq --private
    regvq push --run runs/ar --to me/scenes-ar --license mit  # and tokenizer

Log in with `hf auth login` first. The upload has the final model, config.json, evaluation.json,
the last images and the card, but no checkpoints and no logs; local paths are cut to their last
name. The model then loads by name: VQGAN.from_pretrained("me/scenes-vq") or --run me/scenes-vq.
"""

_PNG = b"\x89PNG\r\n\x1a\n"  # first bytes of a PNG file
_DIGITS = 12  # of a hash in evaluation.json
_ABSOLUTE = re.compile(r"(?<![^\s=:,;\"'(\[])/(?:[^\s/\"',:;]+/)*([^\s/\"',:;]+)")


@dataclass(frozen=True, kw_only=True)
class PushConfig(Section):
    """A run of ``regvq push``."""

    run: Path
    """Finished run to publish, one of its checkpoints, or a folder of save_pretrained."""
    to: str
    """Repository ORGANIZATION/NAME; created if missing."""
    out: Path | None = None
    """Dry run: write the files to this new folder instead of uploading them."""
    private: bool = False
    """Create a private repository."""
    revision: str | None = None
    """Branch; created if missing. Default: main."""
    license: str | None = None
    """License id of the weights on the hub, such as mit. Default: none stated."""


def push(config: PushConfig) -> None:
    """Publish a run, or write what would be published to a folder, and print its address or path.

    Raises:
        ValueError, OSError: the run, the name or the hub can't be used; the message is one sentence.
    """
    check_name(config.to)
    if config.out is not None:
        check_new_folder(config.out)
    files = published_files(config.run, HubName(config.to, config.revision), config.license)
    console = Console()
    for name, content in files.items():
        say(console, f"{len(content):,} bytes", name)
    if config.out is None:
        message = f"Publish a run of regvq_fast {__version__}"
        address = publish(files, config.to, revision=config.revision, private=config.private, message=message)
        say(console, "published", address)
        return
    with atomic_folder(config.out) as folder:
        for name, content in files.items():
            path = folder / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
    say(console, "not uploaded", f"{config.out} has what would be")


def published_files(run: Path, name: HubName, license: str | None = None) -> dict[str, bytes]:
    """Return the files of a run for the hub by name: model, a prior's tokenizer, measurements, images, model card.

    Raises:
        FileNotFoundError: no such folder, or no model in it.
        ValueError: an unfinished run, a damaged file, a prior without its tokenizer, or measurements of other weights.
    """
    if not run.is_dir():
        raise FileNotFoundError(f"no such folder: --run {run}; give the folder of a run")
    if not (run / WEIGHTS).exists() and (steps := step_folders(run)):
        raise ValueError(
            f"{run} is not finished: continue it with --resume, or publish its newest checkpoint, --run "
            f"{list(steps.values())[-1]}"
        )
    model = read_model(run, VQGAN, *(entry.model for entry in PRIORS.values()))
    files, tokenizer = _model_files(run), model
    commands = [
        f"regvq reconstruct --run {name} photos --out back --sheet sheet.png",
        f"regvq encode --run {name} photos --out photos.npz",
        f"regvq evaluate --run {name} --data photos --out results",
        f"regvq tokens --tokenizer {name} --out cache",
    ]
    train = "regvq train vq"
    if not isinstance(model, VQGAN):
        if not (run / TOKENIZER).is_dir():
            raise ValueError(f"{run} has no {TOKENIZER}/, which its prior needs: give the run itself")
        tokenizer = VQGAN.from_pretrained(run / TOKENIZER)
        files |= {f"{TOKENIZER}/{file}": content for file, content in _model_files(run / TOKENIZER).items()}
        entry = prior_of(model)
        commands, train = [f"regvq sample --run {name} --out samples{_example(model)}"], f"regvq {entry.command}"
    config = json.loads(files[CONFIG])
    evaluation = _evaluation(run, model, tokenizer)
    if evaluation is not None:
        files[RESULTS] = to_json(evaluation)
    images = [path for path in sorted((run / PICTURES).glob("*.png")) if not re.search(r"-\d{7}$", path.stem)]
    files |= {f"{PICTURES}/{path.name}": _image(path, run) for path in images}
    card = model.card(
        name,
        config=config,
        evaluation=evaluation,
        license=license,
        images=[file for file in files if file.startswith(f"{PICTURES}/")],
        commands=commands,
        train=train if "run" in config else "",
    )
    return {CARD: card.text().encode(), **files}


def _example(prior: Any) -> str:
    """Return a condition as flags of `regvq sample`."""
    example = {"segmentation": "map.png", "caption": '"a caption"', "label": f'"{[*prior.label_names, ""][0]}"'}
    kind = prior.conditioned_on
    return f" {CONDITION_FLAGS[kind]} {example[kind]}" if kind in example else ""


def _model_files(folder: Path) -> dict[str, bytes]:
    """Return the files of a model, without folders of this machine, and their manifest."""
    config = json.loads((folder / CONFIG).read_bytes())
    config.setdefault("versions", {"regvq_fast": "of unknown version"})
    files = {CONFIG: to_json(without_folders(config)), WEIGHTS: (folder / WEIGHTS).read_bytes()}
    return with_manifest(files)


def _image(path: Path, run: Path) -> bytes:
    """Return a PNG file of a run; ValueError for anything else, such as a link to a private key."""
    if path.is_file() and path.resolve().is_relative_to(run.resolve()):
        content = path.read_bytes()
        if content.startswith(_PNG):
            return content
    raise ValueError(f"{path} is not an image of this run: remove it")


def _evaluation(run: Path, model: Model, tokenizer: Model) -> dict[str, Any] | None:
    """Return the measurements of a run, without folders of this machine; None if there are none."""
    path = run / RESULTS
    if not path.is_file():
        return None
    try:
        content: dict[str, Any] = without_folders(json.loads(path.read_bytes()))
        for found in content.values():
            _ = found["name"], found["value"], found["data"], found["split"]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} is damaged or not of `regvq evaluate`: remove it, or measure again") from None
    hashes = {"tokenizer_sha256": weights_hash(tokenizer)[:_DIGITS], "prior": weights_hash(model)[:_DIGITS]}
    for found in content.values():
        for key, expected in hashes.items():
            if key in found and not str(found[key]).endswith(expected):
                raise ValueError(
                    f"{path} has other weights ({key} {found[key]}) than {run} ({expected}): remove it, or "
                    "measure again with `regvq evaluate`"
                )
    return content


def without_folders(value: Any) -> Any:
    """Return JSON values with absolute paths, also inside texts, reduced to their names."""
    paths: set[str] = set()
    _walk(value, lambda text: paths.add(text) if text.startswith("/") and "\n" not in text else None)
    longest_first = sorted(paths, key=len, reverse=True)

    def shortened(text: str) -> str:
        for path in longest_first:
            text = text.replace(path, Path(path).name)
        return _ABSOLUTE.sub(r"\1", text)

    return _walk(value, shortened)


def _walk(value: Any, change: Any) -> Any:
    """Return a copy of JSON values with every string changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _walk(item, change) for key, item in value.items()}
    return [_walk(item, change) for item in value] if isinstance(value, list) else value


def main(args: Sequence[str]) -> None:
    """Run ``regvq push``."""
    run_command("push", PushConfig, push, USAGE, args)
