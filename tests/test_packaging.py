"""Every form of the package holds the kernels: plain checkout, editable install, wheel, wheel built from the sdist."""

import importlib.metadata
import json
import re
import runpy
import shutil
import site
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from regvq_fast.version import __version__

ROOT = Path(__file__).resolve().parents[1]
# A checkout also holds runs, environments and caches: copy only what the project consists of.
FOLDERS = ("kernels", "regvq_fast", "train", "tests", "bench", "docs")
KERNELS = sorted(path.stem for path in (ROOT / "kernels").glob("*.py"))

# Runs with neither the `site` module nor the environment's own installation of the package, both of which could supply
# what the form under test lacks. The .pth file of an editable install still takes effect, through `addsitedir`.
PROBE = """
import importlib, importlib.util, json, site, sys

target, libraries, folders, modules = json.loads(sys.argv[1])
site.addsitedir(target)
stray = [name for name in folders if importlib.util.find_spec(name)]
sys.path += libraries
found = {name: importlib.util.find_spec(name).origin for name in modules}
if importlib.util.find_spec("triton"):
    for name in modules:
        importlib.import_module(name)
print(json.dumps({"stray": stray, "found": found}))
"""


class Form(NamedTuple):
    target: Path  # folder that goes on the module search path
    package: Path  # folder that `import regvq_fast` must resolve to


class Distributions(NamedTuple):
    checkout: Path
    sdist: Path
    wheels: Mapping[str, Path]  # "wheel": built from the checkout, "sdist": built from the unpacked sdist
    forms: Mapping[str, Form]


def run(arguments: Sequence[str | Path], cwd: Path) -> str:
    completed = subprocess.run(arguments, cwd=cwd, capture_output=True, text=True, check=False)
    assert completed.returncode == 0, f"{arguments[:4]}\n{completed.stdout}\n{completed.stderr}"
    return completed.stdout


def build(source: Path, kind: str, destination: Path) -> Path:
    """Call one hook of the build backend, as pip does without build isolation: nothing is downloaded."""
    code = f"import sys, build_backend; build_backend.{kind}(sys.argv[1])"
    destination.mkdir()
    run([sys.executable, "-c", code, destination], cwd=source)
    (built,) = (path for path in destination.iterdir() if path.suffix != ".egg-info")
    return built


def install(wheel: Path, target: Path) -> Path:
    """Unpack the wheel, which is all that installing a pure Python wheel comes to."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def probe(form: Form, modules: Sequence[str], cwd: Path) -> dict[str, Any]:
    """Report what a fresh interpreter, started in the unrelated folder `cwd`, imports from this form."""
    libraries = [*site.getsitepackages(), site.getusersitepackages()]
    arguments = json.dumps([str(form.target), libraries, [name for name in FOLDERS if name != "regvq_fast"], modules])
    return json.loads(run([sys.executable, "-I", "-S", "-c", PROBE, arguments], cwd))


def contents(wheel: Path) -> dict[str, bytes]:
    """The files of a wheel by name, without its metadata."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if ".dist-info/" not in name}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Distributions:
    folder = tmp_path_factory.mktemp("packaging")
    checkout = folder / "checkout"
    checkout.mkdir()
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy2(path, checkout)
        elif path.name in FOLDERS:
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(path, checkout / path.name, symlinks=True, ignore=ignore)

    sdist = build(checkout, "build_sdist", folder / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    wheels = {
        "wheel": build(checkout, "build_wheel", folder / "from_checkout"),
        "sdist": build(unpacked, "build_wheel", folder / "from_sdist"),
    }
    editable = install(build(checkout, "build_editable", folder / "editable"), folder / "installed_editable")

    forms = {
        "checkout": Form(checkout, checkout / "regvq_fast"),
        "editable": Form(editable, checkout / "regvq_fast"),
    }
    for name, wheel in wheels.items():
        target = install(wheel, folder / f"installed_{name}")
        forms[name] = Form(target, target / "regvq_fast")
    return Distributions(checkout, sdist, wheels, forms)


@pytest.mark.parametrize("name", ["checkout", "editable", "wheel", "sdist"])
def test_kernels_are_found(built: Distributions, name: str, tmp_path: Path) -> None:
    assert KERNELS, "no kernel files: the test would show nothing"
    form = built.forms[name]
    result = probe(form, ["regvq_fast", *(f"regvq_fast.kernels.{kernel}" for kernel in KERNELS)], tmp_path)

    assert Path(result["found"].pop("regvq_fast")) == form.package / "__init__.py"
    for kernel in KERNELS:
        origin = Path(result["found"][f"regvq_fast.kernels.{kernel}"])
        assert origin == form.package / "kernels" / f"{kernel}.py"
        assert origin.read_bytes() == (ROOT / "kernels" / f"{kernel}.py").read_bytes()
    # With a checkout itself on the search path its folders are namespace packages: those alone may be found there.
    assert name == "checkout" or result["stray"] == []


def test_new_kernels_are_live_in_an_editable_install(built: Distributions, tmp_path: Path) -> None:
    added = built.checkout / "kernels" / "added_after_the_install.py"
    added.touch()
    found = probe(built.forms["editable"], [f"regvq_fast.kernels.{added.stem}"], tmp_path)["found"]
    assert Path(found[f"regvq_fast.kernels.{added.stem}"]).samefile(added)


@pytest.mark.parametrize("name", ["wheel", "sdist"])
def test_wheel_holds_the_package_and_nothing_else(built: Distributions, name: str) -> None:
    modules = [path for folder in ("regvq_fast", "kernels") for path in (ROOT / folder).rglob("*.py")]
    relative = {path.relative_to(ROOT).as_posix() for path in modules if "__pycache__" not in path.parts}
    expected = {path if path.startswith("regvq_fast/") else f"regvq_fast/{path}" for path in relative}
    models = {path.relative_to(ROOT).as_posix() for path in (ROOT / "regvq_fast/scenes/pretrained").rglob("*.*")}
    pages = {path.relative_to(ROOT).as_posix() for path in (ROOT / "regvq_fast/cli/help").iterdir()}
    assert models
    others = {"regvq_fast/py.typed", "regvq_fast/kernels/rows.c"}
    others |= {"regvq_fast/demo/page.css", "regvq_fast/demo/painter.js"}
    assert contents(built.wheels[name]).keys() == expected | models | pages | others


def test_a_wheel_is_slim_and_an_editable_install_trains(built: Distributions, tmp_path: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {re.split(r"[<>=]", line)[0] for line in project["dependencies"]}
    assert names == {"torch", "numpy"}
    folder = build(built.checkout, "prepare_metadata_for_build_editable", tmp_path / "metadata")
    lines = importlib.metadata.Distribution.at(folder).metadata.get_all("Requires-Dist")
    required = [line for line in lines if "extra ==" not in line]
    assert required == [*project["dependencies"], *project["optional-dependencies"]["train"]]


def test_the_page_of_an_index_has_no_link_that_leads_nowhere_there(built: Distributions) -> None:
    (folder,) = built.forms["wheel"].target.glob("*.dist-info")
    page = importlib.metadata.Distribution.at(folder).metadata.get_payload()
    assert "# regvq_fast" in page
    assert re.findall(r"\]\((?!\w+:|#)", page) == []
    assert "](https://arxiv.org/abs/2303.06424)" in page
    build_backend = runpy.run_path(str(ROOT / "build_backend.py"))
    text = "![a](docs/a.png) [b](docs/b.md#c) [d](#d) [e](https://e.org)"
    assert build_backend["index_page"](text, None) == " b [d](#d) [e](https://e.org)"
    assert build_backend["index_page"](text, "https://x.org/r") == (
        "![a](https://x.org/r/raw/main/docs/a.png) [b](https://x.org/r/blob/main/docs/b.md#c) [d](#d) [e](https://e.org)"
    )


def test_versions_agree() -> None:
    assert f"version: {__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## [{__version__}] - " in (ROOT / "CHANGELOG.md").read_text()


def test_sdist_builds_the_same_wheel(built: Distributions) -> None:
    assert contents(built.wheels["sdist"]) == contents(built.wheels["wheel"])


def test_sdist_holds_what_the_main_job_needs(built: Distributions) -> None:
    with tarfile.open(built.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    scripts = {path.relative_to(ROOT).as_posix() for path in (ROOT / "train").glob("*.py")}
    assert {"pyproject.toml", "build_backend.py", "constraints.txt", "README.md", "LICENSE", *scripts} <= names


def test_the_wheel_works_in_an_environment_of_its_own(built: Distributions, tmp_path: Path) -> None:
    """Without this project's own installation: of the environment of the tests it sees the libraries alone."""
    run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], cwd=tmp_path)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        tmp_path / "venv",
        "install",
        "--no-deps",
        "--no-index",
        "--ignore-installed",
    ]
    run([*pip, built.wheels["wheel"]], cwd=tmp_path)
    (packages,) = (tmp_path / "venv" / "lib").glob("*/site-packages")
    libraries = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "libraries.pth").write_text("\n".join(libraries))
    python = [tmp_path / "venv" / "bin" / "python", "-I"]

    help_page = run([*python, tmp_path / "venv" / "bin" / "regvq", "--help"], cwd=tmp_path)
    assert "usage: regvq" in help_page
    code = (
        "import regvq_fast, torch; from regvq_fast.ops import vector_quantize;"
        "out = vector_quantize(torch.tensor([[0.9], [-2.0]]), torch.tensor([[-1.0], [1.0]]));"
        "print(regvq_fast.__file__, out.indices.tolist())"
    )
    printed = run([*python, "-c", code], cwd=tmp_path)
    assert printed == f"{packages / 'regvq_fast' / '__init__.py'} [1, 0]\n"


def test_an_index_would_take_the_distributions(built: Distributions) -> None:
    pytest.importorskip("twine")
    run([sys.executable, "-m", "twine", "check", "--strict", built.sdist, built.wheels["wheel"]], cwd=ROOT)


@pytest.mark.parametrize("name", ["wheel", "sdist"])
def test_metadata(built: Distributions, name: str) -> None:
    (folder,) = built.forms[name].target.glob("*.dist-info")
    metadata = importlib.metadata.Distribution.at(folder).metadata
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    assert metadata["Version"] == __version__
    assert metadata["License-Expression"] == "MIT"
    license_text = (folder / "licenses" / "LICENSE").read_text()
    assert license_text.startswith("MIT License")
    assert license_text == (ROOT / "LICENSE").read_text()
    assert {"bench", "test"} <= set(metadata.get_all("Provides-Extra"))
    assert set(metadata.get_all("Provides-Extra")) == project["optional-dependencies"].keys()
    required = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert len(required) == len(project["dependencies"])
    assert any(line.startswith("torch>=") for line in required), "torch is a plain lower bound, pinned by constraints"
