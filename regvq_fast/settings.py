"""Base of settings: dataclasses with checks whose fields are flags and whose fields' docstrings are the help."""

import inspect
import math
from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import Annotated, ClassVar, Literal, get_args, get_origin, get_type_hints

try:
    from tyro.conf import arg
except ModuleNotFoundError:  # ops, quantizers and losses work without tyro
    arg = SimpleNamespace


class Section:
    """Base of the dataclasses whose fields are flags."""

    def __init_subclass__(cls) -> None:
        # The help shows a default as "[0.1]"; the docstring explains a default of None or "".
        shown = arg(help_behavior_hint=lambda default: "" if default in ("None", "") else f"[{default}]")
        cls.__annotations__ = {
            name: hint if get_origin(hint) is ClassVar else Annotated[hint, shown]
            for name, hint in inspect.get_annotations(cls).items()
        }

    def check(self) -> None:
        """Raise ValueError for settings that are wrong on their own; subclasses extend it."""
        for name, hint in get_type_hints(type(self)).items():
            value = getattr(self, name)
            if get_origin(hint) is Literal and value not in get_args(hint):
                raise ValueError(f"{name} must be one of {', '.join(map(repr, get_args(hint)))}, got {value!r}")


def flag_of(section: type, name: str) -> str:
    """Return the flag of a section's field: "--grad-accum-steps" for `accumulate`."""
    hint = get_type_hints(section, include_extras=True)[name]
    names = (getattr(extra, "name", None) for extra in getattr(hint, "__metadata__", ()))
    return "--" + next(filter(None, names), name.replace("_", "-"))


def changed_flags(section: object, names: Iterable[str]) -> list[str]:
    """Return the fields in ``names`` that differ from their defaults, as flags: "--crop center", "--no-flip"."""
    kind = type(section)
    flags = {flag_of(kind, name): value for name in names if (value := getattr(section, name)) != getattr(kind, name)}
    return [f"--no-{flag[2:]}" if value is False else f"{flag} {value}" for flag, value in flags.items()]


def check_finite(section: object) -> None:
    """Raise ValueError for a field that is or contains nan or inf."""
    for name, value in vars(section).items():
        numbers = value if isinstance(value, tuple) else (value,)
        if not all(math.isfinite(number) for number in numbers if isinstance(number, float)):
            raise ValueError(f"{flag_of(type(section), name)} must be finite, got {value}")


def check_at_least(least: int, values: Mapping[str, float]) -> None:
    """Raise ValueError for a value, by flag, below ``least`` (0 or 1)."""
    for flag, value in values.items():
        if not value >= least:
            raise ValueError(f"{flag} must {'be at least 1' if least else 'not be negative'}, got {value}")


def check_probabilities(values: Mapping[str, float]) -> None:
    """Raise ValueError for a value, by flag, outside [0, 1]."""
    for flag, probability in values.items():
        if not 0 <= probability <= 1:
            raise ValueError(f"{flag} is a probability and must lie in [0, 1], got {probability}")
