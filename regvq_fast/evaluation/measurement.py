"""Measurements with their protocols, saved as JSON and printed as tables."""

import json
import math
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from regvq_fast.files import atomic_path
from regvq_fast.precision import Precision
from regvq_fast.ranks import world_size
from regvq_fast.version import __version__

RESULTS = "evaluation.json"
"""File of a run's measurements."""
CODE_COUNTS = "code_counts.json"
"""File beside it, of a tokenizer: the number of selections of each code, a list of N numbers."""
NOTE = "note"
"""Key of a protocol: a caveat to show beside the number."""


@dataclass(frozen=True)
class Measurement:
    """A number with its protocol."""

    name: str
    """Name to show: FID only for Inception features, LPIPS only for ImageNet's VGG-16."""
    value: float
    protocol: dict[str, Any]
    """Everything that the number depends on, as plain values."""


def run_metadata(precision: Precision, batch_size: int, command: str) -> dict[str, Any]:
    """Return the part of a protocol that all numbers of a run share: device, precision, versions."""
    device = "CPU" if precision.device.type == "cpu" else torch.cuda.get_device_name(precision.device)
    kind = precision.reason.partition(" (")[0]
    return {
        "precision": kind if precision.device.type == "cpu" else f"{kind}, TF32 where fp32",
        "device": device if world_size() == 1 else f"{device}, {world_size()} processes",
        "batch_size": batch_size,
        "command": command,
        "versions": {
            "regvq_fast": __version__,
            "python": platform.python_version(),
            **{package: version(package) for package in ("torch", "torchmetrics", "Pillow")},
        },
    }


def write_measurements(path: Path, measurements: Mapping[str, Measurement]) -> None:
    """Write measurements atomically: by key an object with name, value and protocol; NaN and infinities become null."""
    content = {
        key: {"name": found.name, "value": found.value if math.isfinite(found.value) else None, **found.protocol}
        for key, found in measurements.items()
    }
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def print_measurements(console: Console, measurements: Mapping[str, Measurement]) -> None:
    """Print a table of the numbers with what differs between their protocols, then the common protocol and notes."""
    protocols = [found.protocol for found in measurements.values()]
    common = {name: value for name, value in protocols[0].items() if all(p.get(name) == value for p in protocols)}
    numbers = Table(title=Text("metrics"), title_justify="left")
    for column in ("metric", "value", "measured with"):
        numbers.add_column(column, overflow="fold")
    for found in measurements.values():
        own = {k: v for k, v in found.protocol.items() if k not in common and k != NOTE and v is not None}
        numbers.add_row(Text(found.name), f"{found.value:.5g}", Text(_text(own)))
    shared = Table(title=Text("protocol"), title_justify="left", show_header=False)
    shared.add_column(style="bold", no_wrap=True)
    shared.add_column(overflow="fold")
    for name, value in common.items():
        if name != NOTE:
            shared.add_row(name, Text(_text(value) if isinstance(value, dict) else str(value)))
    console.print(numbers)
    console.print(shared)
    for note in dict.fromkeys(str(protocol[NOTE]) for protocol in protocols if NOTE in protocol):
        console.print(Text.assemble(("warning: ", "bold yellow"), note), soft_wrap=True)


def _text(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
