"""Configurations in a run's config.json, and changes of fields by name."""

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

from regvq_fast.config.sections import Config
from regvq_fast.config.tokenizer import QuantizerConfig, quantizer_section
from regvq_fast.json_values import check_types, parse_json
from regvq_fast.quantizers import QUANTIZERS

# Removed settings, with their defaults: a file with these values still describes the same run.
_REMOVED: dict[str, object] = {"contrastive_max_places": 4096, "contrastive_layer_weights": []}
_RENAMED = {"caption_dropout": "condition_dropout"}


def read_config(folder: Path, kind: type[Config]) -> Config:
    """Read the configuration of a run, given its folder or its config.json.

    Relative paths that don't exist here are resolved in the folder in which the run was started.

    Raises:
        ValueError: there is no configuration, or it is of another kind of run.
    """
    path = folder / "config.json" if folder.suffix != ".json" else folder
    try:
        return config_from_dict(parse_json(path.read_bytes()), kind)
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"there is no run in {path.parent}: it has no {path.name}") from None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is not the configuration of a run of this script: {error}") from None


def config_from_dict(values: Mapping[str, Any], kind: type[Config]) -> Config:
    """Return a configuration from the JSON of its ``dataclasses.asdict``; missing fields get their defaults.

    Raises:
        ValueError, TypeError: the values are not such a configuration.
    """
    if not isinstance(values, Mapping):
        raise ValueError("it has no sections")
    sections: dict[str, Any] = {}
    for section in fields(kind):
        if not isinstance(saved := values.get(section.name), Mapping):
            raise ValueError(f"it has no section {section.name!r}")
        started_in = Path(str(values.get("started_in", ".")))
        hint = get_type_hints(kind)[section.name]
        if hint is QuantizerConfig:
            hint, saved = _quantizer_section(saved)
        sections[section.name] = _section(saved, hint, started_in)
    config = kind(**sections)
    return replace(config, run=replace(config.run, resume=False, config=None))


def _quantizer_section(saved: Mapping[str, Any]) -> tuple[type[QuantizerConfig], Mapping[str, Any]]:
    """Return the class of a saved section and its settings; older files have the settings of all quantizers."""
    if (name := saved.get("quantizer")) not in QUANTIZERS:
        raise ValueError(f"there is no quantizer {name!r}")
    own = {item.name for item in fields(QUANTIZERS[name].Settings)}
    others = {item.name for kind in QUANTIZERS.values() for item in fields(kind.Settings)} - own
    return quantizer_section(name), {key: value for key, value in saved.items() if key not in others}


def _section(saved: Mapping[str, Any], kind: type, started_in: Path) -> Any:
    hints = get_type_hints(kind)
    values = {_RENAMED.get(name, name): value for name, value in saved.items()}
    for name, value in list(values.items()):
        if name not in hints:
            if name not in _REMOVED or value != _REMOVED[name]:
                raise ValueError(f"no such field: {name}")
            del values[name]
        elif isinstance(value, list):
            values[name] = tuple(value)
        elif value is not None and Path in (hints[name], *get_args(hints[name])):
            path = started_in / value
            values[name] = path if name != "out" and path.exists() and not Path(value).exists() else Path(value)
    check_types(kind, values)
    return kind(**values)


def override(config: Config, /, **changes: object) -> Config:
    """Return a copy with fields replaced by name, in any section: ``override(config, steps=3, num_codes=16)``."""
    sections: dict[str, object] = {}
    for section in fields(config):
        part = getattr(config, section.name)
        if isinstance(part, QuantizerConfig) and "quantizer" in changes:
            part = part.changed_to(str(changes["quantizer"]))
        own = {name: value for name, value in changes.items() if hasattr(part, name)}
        sections[section.name] = replace(part, **own)
        changes = {name: value for name, value in changes.items() if name not in own}
    if changes:
        raise ValueError(f"no such field: {', '.join(changes)}")
    return replace(config, **sections)  # type: ignore[arg-type]
