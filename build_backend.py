"""Build backend: setuptools', but an editable install brings the extra `train` without being asked.

A wheel is for those who import the ops, and needs torch and numpy alone; a checkout is there to train.
"""

from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403 - the hooks that are as they were

_TRAIN = '; extra == "train"'


def prepare_metadata_for_build_editable(metadata_directory: str, config_settings: Any = None) -> str:
    """Write the metadata that pip resolves the dependencies of an editable install by."""
    name = build_meta.prepare_metadata_for_build_editable(metadata_directory, config_settings)
    path = Path(metadata_directory, name, "METADATA")
    head, blank, body = path.read_text(encoding="utf-8").partition("\n\n")
    lines = [line.removesuffix(_TRAIN) for line in head.split("\n") if line.endswith(_TRAIN)]
    path.write_text("\n".join([head, *lines]) + blank + body, encoding="utf-8")
    return name
