"""Imports go one way and module names are unique, as the documents promise."""

import ast
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "regvq_fast"
# A layer may import from itself and from those above it in this list.
LAYERS = [
    "version invocation streams orphans files json_values ownership nvml dispatch matmul native",
    "kernels",
    "ops",
    "ranks console number_formats padding settings precision termination",
    "quantizers losses",
    "models",
    "data scenes image_grids",
    "config",
    "evaluation",
    "training",
    "priors",
    "paper demo",
    "cli",
    "__main__",
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names.split()}
LEVEL["integrations"] = LEVEL["models"]
# Modules that are one of a kind in each folder of a prior.
OF_EVERY_PRIOR = {"model", "config", "recipe", "sampler"}


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "kernels").glob("*.py")]:
        inside = Path("kernels") / path.name if path.parent == ROOT / "kernels" else path.relative_to(PACKAGE)
        if path.is_relative_to(PACKAGE / "kernels"):  # the link
            continue
        parts = ("regvq_fast", *inside.with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, known: dict[str, Path]) -> set[str]:
    """Modules of the package that a module imports anywhere, in functions and for type checkers, too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in known else node.module for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & known.keys()


def layer_of(module: str) -> str:
    """Name of a module or package directly in the package; empty for the package itself."""
    return module.partition(".")[2].partition(".")[0]


def test_imports_go_one_way() -> None:
    known = modules()
    wrong = []
    for module, path in known.items():
        layer = layer_of(module)
        if not layer:  # the package's own __init__
            continue
        for imported in imports(path, known):
            source = layer_of(imported)
            if source and LEVEL[source] > LEVEL[layer]:
                wrong.append(f"{module} imports {imported}")
    assert not wrong, wrong


def test_there_is_no_circle_of_imports() -> None:
    known = modules()
    edges = {module: imports(path, known) - {module} for module, path in known.items()}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail[trail.index(module) :], module))
        if module not in done:
            for imported in sorted(edges[module]):
                visit(imported, (*trail, module))
            done.add(module)

    for module in sorted(edges):
        visit(module, ())


def test_no_two_modules_share_a_name() -> None:
    names = [path.stem for module, path in modules().items() if not module.startswith("regvq_fast.kernels")]
    priors = [path.stem for path in (PACKAGE / "priors").glob("*/*.py")]
    # An op has the name of its kernel; a prior's folder has the modules that every one has.
    shared = {name for name, count in Counter(names).items() if count > 1} - {"__init__"}
    assert {
        name for name in shared if name not in OF_EVERY_PRIOR or names.count(name) > priors.count(name) + 1
    } == set()
