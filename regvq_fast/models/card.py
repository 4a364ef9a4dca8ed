"""Model cards for the Hugging Face Hub: use, results, training and limits of a published model."""

import json
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from regvq_fast.models.hub import HubName, import_hub
from regvq_fast.models.pretrained import CONFIG
from regvq_fast.quantizers import QUANTIZERS

_NOT_SETTINGS = ("started_in", "facts", "architecture", "versions")  # of config.json
_OF_THE_RUN = ("preset", "seed", "amp", "compile", "deterministic")  # other settings of a run are logging and machine
_FIRST = ("reconstructions", "samples")  # images below the title
_CAPTIONS = {
    "reconstructions": "Images of the validation split above, their reconstructions below.",
    "codebook": "Each code, decoded by itself.",
    "usage": "How often each code is selected.",
    "samples": "Conditions, samples under them, and the reconstructions of the images that they belong to.",
}


@dataclass(frozen=True, kw_only=True)
class Card:
    """Contents of a model card."""

    name: HubName
    """Repository and branch of the model."""
    kind: Any
    """Class of the model, a `regvq_fast.models.model.Model`."""
    config: Mapping[str, Any]
    """Contents of config.json, of a run or with the architecture only."""
    parameters: int
    """Number of parameters."""
    sha256: str
    """Hash of the weights, `regvq_fast.models.weights_hash`."""
    evaluation: Mapping[str, Mapping[str, Any]] | None = None
    """Contents of evaluation.json: name, value and protocol of each number, by key."""
    license: str | None = None
    """Identifier on the hub."""
    images: Sequence[str] = ()
    """Paths of published images."""
    commands: Sequence[str] = ()
    """Command lines that use the model."""
    train: str = ""
    """Command that trained it, such as "regvq train vq"."""

    def text(self) -> str:
        """Return the card: YAML metadata, then Markdown."""
        sections = (self._head(), self._use(), self._results(), self._training(), self._limits(), self._license())
        return f"---\n{self._metadata()}\n---\n\n" + "\n\n".join(filter(None, sections)) + "\n"

    def _metadata(self) -> str:
        hub = import_hub("to write a model card")
        results = [
            hub.EvalResult(
                task_type=self.kind.pipeline_tag,
                task_name=self.kind.title,
                dataset_type=_slug(found["data"]),
                dataset_name=found["data"],
                dataset_split=found["split"],
                metric_type=_slug(found["name"]),
                metric_name=found["name"],
                metric_value=found["value"],
            )
            for found in (self.evaluation or {}).values()
            if found["value"] is not None
        ]
        quantizer = self.config["architecture"].get("quantizer", {}).get("type")
        names = [name for name, kind in QUANTIZERS.items() if kind.__name__ == quantizer]
        tags = ["vector-quantization", _slug(self.kind.title), *names]
        measured = {"model_name": self.name.title, "eval_results": results} if results else {}
        text: str = hub.ModelCardData(
            library_name="regvq_fast",
            pipeline_tag=self.kind.pipeline_tag,
            tags=tags,
            license=self.license,
            **measured,
        ).to_yaml()
        return text

    def _head(self) -> str:
        version = self.config["versions"]["regvq_fast"]
        facts = {
            "model": f"{self.kind.__name__}, {self.parameters:,} parameters",
            "weights": f"SHA-256 {self.sha256[:12]} of names and values (`regvq_fast.models.weights_hash`)",
            "architecture": _items(self.config["architecture"], leave_out=("type",)),
        }
        lines = [f"# {self.name.title}", f"{self.kind.title}, made with regvq_fast {version}."]
        lines += [_image(path) for path in self.images if _stem(path) in _FIRST]
        return "\n\n".join([*lines, _table(("", ""), facts.items())])

    def _use(self) -> str:
        name, package = self.kind.__name__, self.kind.__module__.rpartition(".")[0]
        example = self.kind.example.format(**self.config["architecture"])
        imports = "import torch\n" if example else ""
        lines = [
            "## Use",
            '```bash\npip install "regvq-fast[train,hub]"\n```',
            f"```python\n{imports}from {package} import {name}\n\n"
            f'model = {name}.from_pretrained("{self.name}")\n{example}```',
        ]
        if self.commands:
            lines.append("```bash\n" + "\n".join(self.commands) + "\n```")
        return "\n\n".join(lines)

    def _results(self) -> str:
        images = [_image(path) for path in self.images if _stem(path) not in _FIRST]
        if not self.evaluation:
            lack = (
                "Not measured: there is no `evaluation.json`. `regvq evaluate` makes one, whose numbers `regvq push` "
                "shows here."
            )
            return "\n\n".join(["## Results", lack, *images])
        protocols = [
            {key: value for key, value in found.items() if key not in ("name", "value", "note") and value is not None}
            for found in self.evaluation.values()
        ]
        common = {key: value for key, value in protocols[0].items() if all(p.get(key) == value for p in protocols)}
        rows = [
            (
                found["name"],
                "not finite" if found["value"] is None else f"{found['value']:.5g}",
                _items(own, leave_out=common),
            )
            for found, own in zip(self.evaluation.values(), protocols, strict=True)
        ]
        notes = dict.fromkeys(found["note"] for found in self.evaluation.values() if "note" in found)
        return "\n\n".join(
            [
                "## Results",
                "Measured by `regvq evaluate`; `evaluation.json` has each number with its whole protocol.",
                _table(("metric", "value", "measured with"), rows),
                "What all of them were measured with:",
                _table(("protocol", ""), ((key, _items({"": value})) for key, value in common.items())),
                *(f"> **Note:** {note}." for note in notes),
                *images,
            ]
        )

    def _training(self) -> str:
        facts, versions = self.config.get("facts"), _items(self.config["versions"])
        if facts is None:
            return f"## Training\n\nNot recorded in `{CONFIG}`. Saved with {versions}."
        rows = [*facts.items()]
        for section, values in self.config.items():
            if section not in _NOT_SETTINGS:
                shown = {name: values.get(name) for name in _OF_THE_RUN} if section == "run" else values
                rows.append((f"settings: {section}", _items(shown)))
        again = f" `{self.train} --config {CONFIG}` trains with the same settings; paths in it are reduced to names."
        return "\n\n".join(
            [
                "## Training",
                f"All settings are in `{CONFIG}`.{again if self.train else ''}",
                _table(("", ""), [*rows, ("versions", versions)]),
            ]
        )

    def _limits(self) -> str:
        facts, size = self.config.get("facts", {}), self.config["architecture"].get("image_size")
        data = facts.get("data") or facts.get("tokens")
        limits = [
            f"It has learned from its training data only ({data}). How it does on other images was not measured."
            if data
            else "What it was trained on is not recorded here.",
            *([f"It was trained on images of {size} x {size} pixels."] if size else []),
            "Its images are approximations: text, faces and fine texture change. Don't use them where details count.",
            "It takes over what its training images show, and leave out. No test for bias was made.",
        ]
        return "\n".join(["## Limits", "", *(f"- {limit}" for limit in limits)])

    def _license(self) -> str:
        if self.license is None:
            return "## License\n\nNone is stated. Ask the author before using the weights."
        return f"## License\n\nThe weights: {self.license}. Licenses of the training images are their own."


def _stem(path: str) -> str:
    return path.rpartition("/")[2].partition(".")[0]


def _image(path: str) -> str:
    """Return an image with its caption."""
    return "\n\n".join(filter(None, (f"![{_stem(path)}]({path})", _CAPTIONS.get(_stem(path)))))


def _items(values: Mapping[str, Any], leave_out: Iterable[str] = ()) -> str:
    """Return values as "name value, ..." on one line, without those that are None."""
    words = []
    for name, value in values.items():
        if name in leave_out or value is None or value == {}:
            continue
        if isinstance(value, Mapping):
            value = _items(value) if not name else f"({_items(value)})"
        elif isinstance(value, (list, tuple)):
            value = json.dumps(value)
        words.append(f"{name} {value}".strip())
    return ", ".join(words)


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a table in Markdown."""
    cells = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(re.sub(r"\s*\n\s*|\|", " ", str(cell)) for cell in row) + " |" for row in cells)


def _slug(text: str) -> str:
    """Return a text in ASCII letters, digits and hyphens: "Fréchet distance[R]" becomes "frechet-distance-r"."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")
