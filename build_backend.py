"""Build backend: setuptools', with two additions.

A wheel is for those who import the ops, and needs torch and numpy alone; an editable install, which is a checkout, also
brings the extra `train` without being asked. The page that a package index shows is README.md without links that would
lead nowhere there: relative ones are completed by the address under "Repository" in pyproject.toml, or become text
where there is none.
"""

import re
import tomllib
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403 - the hooks that are as they were

_TRAIN = '; extra == "train"'
_PAGE = Path("build/index-page.md")


def prepare_metadata_for_build_editable(metadata_directory: str, config_settings: Any = None) -> str:
    """Write the metadata that pip resolves the dependencies of an editable install by."""
    write_page()
    name = build_meta.prepare_metadata_for_build_editable(metadata_directory, config_settings)
    path = Path(metadata_directory, name, "METADATA")
    head, blank, body = path.read_text(encoding="utf-8").partition("\n\n")
    lines = [line.removesuffix(_TRAIN) for line in head.split("\n") if line.endswith(_TRAIN)]
    path.write_text("\n".join([head, *lines]) + blank + body, encoding="utf-8")
    return name


def prepare_metadata_for_build_wheel(metadata_directory: str, config_settings: Any = None) -> str:
    """Write the metadata of a wheel."""
    write_page()
    return build_meta.prepare_metadata_for_build_wheel(metadata_directory, config_settings)


def build_editable(wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None) -> str:
    """Build an editable wheel."""
    write_page()
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)


def build_wheel(wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None) -> str:
    """Build a wheel."""
    write_page()
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_sdist(sdist_directory: str, config_settings: Any = None) -> str:
    """Build a source distribution."""
    write_page()
    return build_meta.build_sdist(sdist_directory, config_settings)


def write_page() -> None:
    """Write the page of the index, which pyproject.toml names as its readme."""
    project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
    _PAGE.parent.mkdir(exist_ok=True)
    text = Path("README.md").read_text(encoding="utf-8")
    _PAGE.write_text(index_page(text, project["urls"].get("Repository")), encoding="utf-8")


def index_page(text: str, repository: str | None) -> str:
    """Return Markdown whose relative links and images are absolute, or text and nothing where there is no address."""

    def complete(match: re.Match[str]) -> str:
        image, label, target = match.groups()
        if repository is None:
            return "" if image else label
        return f"{image}[{label}]({repository}/{'raw' if image else 'blob'}/main/{target})"

    return re.sub(r"(!?)\[([^\]]*)\]\((?!\w+:|#)([^)\s]+)\)", complete, text)
