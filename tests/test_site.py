"""The site of the documentation builds without a warning and loads nothing from elsewhere; its notebooks run.

`mkdocs build --strict` itself fails at a link or an anchor that leads nowhere: `validation` in mkdocs.yml.
"""

import importlib
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from test_docs import PACKAGES

pytest.importorskip("mkdocs")
nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


class Resources(HTMLParser):
    """Addresses of what a browser loads to show a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        named = dict(attributes)
        if tag == "link" and named.get("rel") not in ("canonical", "next", "prev"):
            self.found.append(named["href"] or "")
        elif tag != "a":
            self.found += [named[name] or "" for name in ("src", "srcset", "data") if name in named]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    # These two are notes of mkdocs, not warnings: a link to a file that mkdocs.yml leaves out, a page that no tab has.
    assert "excluded from the built site" not in built.stderr, built.stderr
    assert "not included in the" not in built.stderr, built.stderr
    return folder


def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    loaded = {address for page in pages for address in Resources(page.read_text(encoding="utf-8")).found}
    assert any(address.endswith("site.css") for address in loaded)
    assert any(address.endswith(".js") for address in loaded)
    assert sorted(address for address in loaded if re.match(r"\w+:|//", address)) == []
    sheets = [sheet.read_text(encoding="utf-8") for sheet in site.rglob("*.css")]
    assert not any(re.search(r"@import|url\(\s*[\"']?(?:https?:)?//", sheet) for sheet in sheets)


def test_formulas_are_mathml(site: Path) -> None:
    page = (site / "docs" / "mathematics" / "index.html").read_text(encoding="utf-8")
    formulas = re.findall(r"<math .*?</math>", page, re.DOTALL)
    source = (ROOT / "docs" / "mathematics.md").read_text(encoding="utf-8")
    assert len(formulas) == len(re.findall(r"^```math$|\$[^$]+\$", source, re.MULTILINE))
    # A command or an alignment that the converter doesn't know stands there as it was written.
    assert [formula for formula in formulas if re.search(r"<m\w+>(\\\w|&(amp;)?<)", formula)] == []
    assert not any("arithmatex" in path.read_text(encoding="utf-8") for path in site.rglob("*.html"))


def test_the_reference_has_every_public_name(site: Path) -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in (site / "docs" / "api").rglob("*.html"))
    shown = set(re.findall(r'id="(regvq_fast[\w.]+)"', text))
    packages = [importlib.import_module(name) for name in PACKAGES[1:]]
    public = [(package, name) for package in packages for name in package.__all__]
    assert len(public) > 100
    lacking = []
    for package, name in public:
        own = getattr(getattr(package, name), "__name__", name)  # another name for the same function has no entry
        # A function that is named like its module is found there: the package has room for one of them.
        if not {f"{package.__name__}.{place}" for place in (name, own, f"{own}.{own}")} & shown:
            lacking.append(name)
    assert lacking == []
    assert not re.search(r":\w+:<code>|:\w+:`", text), "a role that nothing resolves"


def kinds_of_output(notebook: Any) -> list[set[str]]:
    return [{output.output_type for output in cell.get("outputs", [])} for cell in notebook.cells]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All cells run, and give outputs of the kinds that the notebook shows."""
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
    notebook = nbformat.read(path, as_version=4)
    shown = kinds_of_output(notebook)
    assert sum(map(len, shown)) >= 2
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert kinds_of_output(notebook) == shown
