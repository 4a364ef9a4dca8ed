"""Docstrings of the public API exist, and documents quote messages and headings that exist."""

import ast
import functools
import importlib
import inspect
import itertools
import re
from pathlib import Path
from types import FunctionType, ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES, ROOT / "results" / "README.md"]
PACKAGES = [
    "regvq_fast",
    *(f"regvq_fast.{name}" for name in "ops quantizers losses models data scenes evaluation integrations".split()),
    *(f"regvq_fast.priors.{name}" for name in "autoregressive diffusion maskgit".split()),
]
"""The API reference has all of them, in docs/api; the names of the first are those of others."""


def attribute_docstrings(body: list[ast.stmt]) -> set[str]:
    """Names that are assigned or annotated with a string below."""
    names = set()
    for statement, below in itertools.pairwise(body):
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) and isinstance(below.value.value, str):
            targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


@functools.cache
def tree_of(module: ModuleType) -> ast.Module:
    return ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))


def origin(package: ModuleType, name: str) -> ModuleType:
    """The module in which a package found a name that it exports."""
    for node in ast.walk(tree_of(package)):  # imports may stand behind a condition
        if isinstance(node, ast.ImportFrom) and name in {alias.name for alias in node.names}:
            return origin(importlib.import_module(str(node.module)), name)
    return package


def undocumented(package: ModuleType, name: str) -> list[str]:
    """A public name without a docstring of its own, or the fields and methods of a class that lack one."""
    value = getattr(package, name)
    if not (inspect.isclass(value) or inspect.isfunction(value)):
        return [] if name in attribute_docstrings(tree_of(origin(package, name)).body) else [name]
    if not value.__doc__ or value.__doc__.startswith(f"{name}("):  # what a dataclass or a named tuple makes up
        return [name]
    lacking = []
    if inspect.isclass(value):
        # An override may leave it to its parent; not to nn.Module, whose words about `forward` say nothing.
        parents = [vars(parent) for parent in value.__mro__ if parent.__module__.startswith("regvq_fast")]
        for method, member in vars(value).items():
            if method.startswith("_") or method == "extra_repr" or not isinstance(member, (FunctionType, property)):
                continue
            if not any(method in parent and parent[method].__doc__ for parent in parents):
                lacking.append(f"{name}.{method}")
        if issubclass(value, tuple):  # its fields are all there is to know of it
            tree = tree_of(origin(package, name))
            (body,) = [node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name]
            lacking += [f"{name}.{field}" for field in set(value._fields) - attribute_docstrings(body)]
    return lacking


@pytest.mark.parametrize("name", PACKAGES)
def test_every_public_name_is_documented(name: str) -> None:
    package = importlib.import_module(name)
    assert package.__doc__
    public = [public for public in package.__all__ if not public.startswith("__")]
    assert public
    assert sorted(lack for public in public for lack in undocumented(package, public)) == []


def test_the_reference_has_all_packages() -> None:
    pages = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "api").glob("*.md"))
    assert set(PACKAGES[1:]) <= set(re.findall(r"^::: (\S+)$", pages, re.MULTILINE))


def templates() -> list[re.Pattern[str]]:
    """Return patterns of all program texts that are long enough to be distinguishable."""
    found = []
    for source in (ROOT / "regvq_fast").rglob("*.py"):
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            texts = [str(part.value) if isinstance(part, ast.Constant) else None for part in parts]
            if sum(len(text or "") for text in texts) > 15:
                pattern = "".join(".*?" if text is None else re.escape(text) for text in texts)
                found.append(re.compile(pattern, re.DOTALL))
    return found


def quoted_messages(text: str) -> list[str]:
    """Return the program output that a document quotes."""
    blocks = re.findall(r"^    (?:error|warning): (.*)$|^    (stopped .*)$", text, re.MULTILINE)
    cells = re.findall(r"^\| `([^`]{30,})` \|", text.partition("| message | what to do |")[2], re.MULTILINE)
    return [*("".join(groups) for groups in blocks), *cells]


def test_quoted_messages_are_the_programs() -> None:
    messages = [message for path in DOCUMENTS for message in quoted_messages(path.read_text(encoding="utf-8"))]
    assert len(messages) > 20
    known = templates()
    assert [message for message in messages if not any(text.fullmatch(message) for text in known)] == []
    assert not any(text.fullmatch("the codebook is fine: 100.0% of 16 codes were used") for text in known)


def anchors(text: str) -> set[str]:
    """Return the anchors that GitHub gives the headings of a document."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_into_documents_lead_somewhere(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for path, anchor in re.findall(r"\]\((?!\w+:)([^)#\s]*)#([^)\s]+)\)", text):
        target = document.parent / path if path else document
        assert anchor in anchors(target.read_text(encoding="utf-8")), f"{path}#{anchor}"
