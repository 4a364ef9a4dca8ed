"""The documents can't drift from the project: every path, flag, command and import in them.

The sequence "from nothing to samples" is run as it stands there, at tiny sizes. What needs a GPU, data, the network or
minutes is parsed only: by the parser of the command that it starts.
"""

import ast
import functools
import io
import re
import runpy
import shlex
import sys
import tomllib
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import tyro
from PIL import Image
from safetensors.torch import save_file
from torch.distributed.run import get_args_parser

from regvq_fast.cli.main import COMMANDS as NAMES
from regvq_fast.cli.main import run
from regvq_fast.config import parse_config
from regvq_fast.invocation import SCRIPTS
from regvq_fast.models import VQGAN, VGGFeatures
from regvq_fast.quantizers import QUANTIZERS

ROOT = Path(__file__).resolve().parents[1]
PAGES = [f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))]
DOCUMENTS = ["README.md", "CONTRIBUTING.md", *PAGES, "results/README.md"]
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in DOCUMENTS}
README = TEXTS["README.md"]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)

COMMANDS = [
    "pip install -c constraints.txt -e . && python train/vq.py --compile --amp",
    'pip install -c constraints.txt -e ".[test]" && pytest',
]
# Files by which a path counts as one of the repository even where its first folder doesn't exist (a renamed folder).
SOURCE_SUFFIXES = (".py", ".md", ".toml", ".sh", ".yaml")
# Paths that aren't of a clone: of runs, with a name to fill in, and modules of Python's and of other projects.
ELSEWHERE = re.compile(r"runs/|.*NAME|.*X\.py$|(__init__|tokenize|profile|g_partition)\.py$")


def blocks(text: str, language: str) -> list[str]:
    return [body for found, body in FENCE.findall(text) if found == language]


def shell_commands(text: str) -> list[str]:
    """The simple commands of all bash blocks: comments dropped, continued lines joined, lists and pipes split."""
    lines = re.sub(r"(^|\s)#.*", "", "".join(blocks(text, "bash")).replace("\\\n", " ")).splitlines()
    return [command.strip() for line in lines for command in re.split(r"&&|\|\||[|;]", line) if command.strip()]


def code_spans(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", FENCE.sub("", text))


def mentioned_paths(text: str) -> set[str]:
    """Relative link targets, and the words of code that can only be paths of the repository (globs included)."""
    links = re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", FENCE.sub("", text))
    code = " ".join([*(body for _, body in FENCE.findall(text)), *code_spans(text)])
    words = {word.split("::")[0].strip("\"'`,;:()").removeprefix("./") for word in code.split()}
    folders = {path.name for path in ROOT.iterdir() if path.is_dir()} - {"runs"}  # what a run leaves isn't in a clone
    paths = {
        word
        for word in words
        if re.fullmatch(r"[\w.*-][\w./*-]*", word)
        and not ELSEWHERE.match(word)
        and (("/" in word and word.split("/")[0] in folders) or word.endswith(SOURCE_SUFFIXES))
    }
    return paths | set(links)


_OURS = re.compile(r"(?:train/(\w+\.py)|(?<![\w-])(?:-m regvq_fast|regvq) ((?:train )?[a-z]+))(?![\w/])")


def named(code: str) -> tuple[str, str]:
    """The name of our command in a command line, started in any way, and what is behind it; "" if there is none."""
    found = _OURS.search(code)
    if not found:
        return "", code
    return found[2] or next((name for name, script in SCRIPTS.items() if script == found[1]), ""), code[found.end() :]


def mentioned_flags(text: str) -> dict[str, set[str]]:
    """Flags by the command behind which they stand; "" has those that stand alone in a code span."""
    flags: dict[str, set[str]] = {}
    for code in [*shell_commands(text), *code_spans(text)]:
        name, own = named(code)  # what stands before is the launcher's
        if (name or code.startswith("--")) and (found := re.findall(r"(?<!\S)--[a-z][\w-]*", own)):
            flags.setdefault(name, set()).update(found)
    return flags


def parse(name: str, *flags: str) -> object:
    """Parse the flags of a command into its configuration."""
    parsed: list[object] = []
    module = import_module(f"regvq_fast.cli.{NAMES[name].module}")

    def train(recipe: type, presets: dict, args: list[str]) -> None:
        parsed.append(parse_config(presets, args, recipe.usage))  # type: ignore[attr-defined]

    def run_command(name: str, kind: type, work: object, usage: str, args: list[str], **_: str) -> None:
        parsed.append(tyro.cli(kind, args=args, description=usage))

    training = name.startswith("train ")
    with patch.object(module, "train" if training else "run_command", train if training else run_command):
        run(name, flags)
    return parsed[0]


@functools.cache
def help_of(name: str) -> set[str]:
    """The flags that a command explains; training of a tokenizer those of every quantizer."""
    shown = [["--quantizer", quantizer] for quantizer in QUANTIZERS] if name == "train vq" else [[]]
    with pytest.MonkeyPatch.context() as environment, redirect_stdout(io.StringIO()) as text:
        # Wide enough that the help wraps no flag, and without the terminal codes that could split one.
        for variable, value in {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}.items():
            environment.setenv(variable, value)
        for flags in shown:
            with pytest.raises(SystemExit) as end:
                parse(name, *flags, "--help")
            assert end.value.code == 0
    return set(re.findall(r"--[a-z][\w-]*", text.getvalue()))


def usage_of(name: str) -> list[str]:
    """The commands in the help of a command."""
    module = import_module(f"regvq_fast.cli.{NAMES[name].module}")
    if name.startswith("train "):
        kind = name.split()[1]
        usage = (module.VQGANRecipe if kind == "vq" else module.PRIORS[kind].recipe).usage
    else:
        usage = module.USAGE
    return shell_commands("```bash\n" + "\n".join(re.findall(r"^    (\w.*)$", usage, re.MULTILINE)) + "\n```")


@pytest.mark.parametrize("command", COMMANDS)
def test_command_stands_in_a_bash_block(command: str) -> None:
    assert command in "".join(blocks(README, "bash")).splitlines()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_paths_exist(document: str) -> None:
    paths, home = mentioned_paths(TEXTS[document]), (ROOT / document).parent
    gone = [path for path in paths if not any(ROOT.glob(path.rstrip("/"))) and not (home / path).exists()]
    assert sorted(gone) == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_flags_exist(document: str) -> None:
    known = {name: help_of(name) for name in NAMES}
    scripts = [*(ROOT / "bench").glob("*.py"), ROOT / "tests" / "fuzz.py", ROOT / "tests" / "soak.py"]
    sources = "".join(path.read_text() for path in scripts)
    known["bench"] = set(re.findall(r'"(--[a-z][\w-]*)"', sources))
    known["torchrun"] = set(get_args_parser()._option_string_actions)
    for name, mentioned in mentioned_flags(TEXTS[document]).items():
        assert sorted(mentioned - (known[name] if name else set().union(*known.values()))) == [], name


def test_commands_are_understood(pytestconfig: pytest.Config) -> None:
    """By the parser of what they start; nothing is run."""
    commands = [command for text in TEXTS.values() for command in shell_commands(text)]
    usages = {name: usage_of(name) for name in NAMES}
    assert all(usages.values())
    commands += [command for usage in usages.values() for command in usage]
    assert len(commands) > 60
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for command in commands:
        words = shlex.split(command)
        # A run to resume is not there: its own parser refuses that. An ellipsis stands for more flags.
        flags = [word for word in words if word not in ("--resume", "...")]
        name, own = named(command)
        if name:
            assert words[0] in ("python", "torchrun", "regvq"), command
            if words[0] == "torchrun":
                launched = get_args_parser().parse_args(words[1:])
                assert launched.training_script == ("regvq_fast" if launched.module else f"train/{SCRIPTS[name]}")
            parse(name, *(word for word in shlex.split(own) if word in flags))
        elif words[0] == "python":
            known = (ROOT / words[1]).read_text()
            assert [flag for flag in words[2:] if flag.startswith("--") and f'"{flag}"' not in known] == [], command
        elif words[0] == "pytest":
            own_flags = (ROOT / "bench" / "conftest.py").read_text()
            for flag in (word for word in words if word.startswith("-") and f'"{word}"' not in own_flags):
                pytestconfig.getoption(flag)
        elif words[:2] == ["pip", "install"]:
            chosen = [name for group in re.findall(r"\[([\w,]+)\]", command) for name in group.split(",")]
            assert set(chosen) <= extras.keys(), command
            assert "-c" not in words or (ROOT / words[words.index("-c") + 1]).exists()
        else:
            known = ("pre-commit install", "mkdocs serve", "pyproject-build")
            assert command in known or words[0] == "twine", f"no test knows this kind: {command}"


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 160


@pytest.mark.parametrize(
    "block",
    [*blocks(README, "python"), *blocks(TEXTS["docs/ops.md"], "python")],
    ids=["op", "module", "loss", "residual"],
)
def test_python_of_the_readme_and_of_the_ops_runs(block: str) -> None:
    names: dict[str, object] = {}
    exec(compile(block, "README.md", "exec"), names)
    assert torch.isfinite(names["out"].quantized).all()


def test_the_model_of_the_tutorial_keeps_its_codes() -> None:
    names: dict[str, Any] = {}
    for block in blocks(TEXTS["docs/your-model.md"], "python"):
        exec(compile(block, "docs/your-model.md", "exec"), names)
    (plain, few), (ours, most) = names["measure"](names["plain"]), names["measure"](names["model"])
    assert few < 0.2 < 0.9 < most
    assert ours > plain + 3


@pytest.mark.parametrize(
    "document", [name for name in DOCUMENTS if "from regvq_fast" in "".join(blocks(TEXTS[name], "python"))]
)
def test_imports_of_python_blocks_work(document: str) -> None:
    imports = [
        node
        for block in blocks(TEXTS[document], "python")
        for node in ast.walk(ast.parse(block))
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("regvq_fast")
    ]
    assert imports
    exec(compile(ast.Module(imports, type_ignores=[]), document, "exec"), {})


# ------------------------------------------------------------------------------------------- from nothing to samples

PRIOR = "--steps 2 --batch-size 8 --warmup-steps 1 --width 16 --depth 1 --heads 2 --device cpu"
TINY = {
    "vq.py": "--no-compile --steps 2 --warmup-steps 1 --batch-size 4 --image-size 32 --ch 8 --ch-mult 1 1 2 "
    "--z-channels 8 --code-dim 8 --num-codes 16 --val-images 6 --perceptual-weight 0 --contrastive none --device cpu",
    "cache_tokens.py": "--scenes 24 --val-images 8 --views 1 --device cpu",
    "ar.py": PRIOR,
    "diffusion.py": f"{PRIOR} --diffusion-steps 5",
    "sample.py": "--num-images 2 --device cpu",
    "evaluate.py": "--val-images 3 --fid-features vgg16:vgg.safetensors --perceptual-weights vgg.safetensors "
    "--cache-dir statistics --workers 0 --device cpu",
}
"""Flags appended to a command to shrink its work."""


def run_tiny(command: str, more: str = "") -> str:
    """Run a command of a document in this process, and return the name of its script."""
    _, path, *flags = shlex.split(command)
    script = path.removeprefix("train/")
    with patch.object(sys, "argv", [path, *flags, *(more or TINY[script]).split()]):
        runpy.run_path(str(ROOT / path), run_name="__main__")
    return script


def test_from_nothing_to_samples(few_regions: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands of docs/priors.md one after the other, then commands and code of the docs that take what those leave."""
    monkeypatch.chdir(tmp_path)
    save_file({name: value.half() for name, value in VGGFeatures("vgg16").state_dict().items()}, "vgg.safetensors")
    sequence = TEXTS["docs/priors.md"].split("## From nothing to samples")[1].split("\n## ")[0]
    commands = [command for command in shell_commands(sequence) if re.search("runs/(vq|ar|diffusion)", command)]
    scripts = [run_tiny(command) for command in commands]
    assert scripts == "vq.py cache_tokens.py ar.py sample.py diffusion.py sample.py evaluate.py".split()
    table = TEXTS["docs/training.md"].split("A run writes to\n`--out`")[1].split("\n\n")[1]
    names = {
        name for cell in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for name in re.findall(r"`([\w.]+)", cell)
    }
    assert len(names) == 7
    assert sorted(name for name in names if not (tmp_path / "runs" / "vq" / name).exists()) == []
    drawn = {"00000.png", "00001.png", "grid.png"}
    for prior in ("ar", "diffusion"):
        assert {path.name for path in (tmp_path / "samples" / prior).iterdir()} == drawn
    assert (tmp_path / "runs" / "ar" / "evaluation.json").exists()

    (tmp_path / "cache").symlink_to("runs/tokens")
    (tmp_path / "runs" / "NAME").symlink_to("vq")
    state: dict[str, Any] = {"model": VQGAN.from_pretrained("runs/vq"), "images": torch.zeros(2, 3, 32, 32)}
    for document, says in {"training": 'from_pretrained("runs/NAME")', "priors": 'TokenDataset("cache"'}.items():
        (block,) = [block for block in blocks(TEXTS[f"docs/{document}.md"], "python") if says in block]
        exec(compile(block, document, "exec"), state)
    assert (tmp_path / "tokenizer" / "model.safetensors").exists()
    assert state["batch"]["tokens"].shape == (64, 8, 8)

    (resume,) = [command for command in shell_commands(TEXTS["docs/training.md"]) if "--resume" in command]
    run_tiny(resume, "--steps 3")
    assert (tmp_path / "runs" / "vq" / "checkpoints" / "step-0000003").exists()
    for name, pixel in {"map": 3, "photo": 99, "mask": 255}.items():
        Image.new("L", (32, 32), pixel).save(f"{name}.png")
    sampling = [command for command in shell_commands(TEXTS["docs/priors.md"]) if "--out samples " in command]
    assert len(sampling) == 3
    for number, command in enumerate(sampling):
        run_tiny(command.replace("--out samples", f"--out sampled/{number}").replace("--steps 25", "--steps 3"))
        assert (tmp_path / "sampled" / str(number) / "grid.png").exists()
    assert (tmp_path / "sampled" / "1" / "strip.png").exists()


def test_readers_find_what_drifts() -> None:
    text = """
See [the log](docs/failed-ideas.md#format), [the paper](https://example.org/paper.html), [below](#results), `images/s`.
`kernels/*.py`, `gone/module.py`, `train/gone.py`, `runs/NAME/metrics.jsonl`, `vgg16/vgg19`; `--tau 0.9` and `--gone`.

```bash
python train/vq.py --steps 3 \\
    --out runs/first  # not a --flag
torchrun --nproc-per-node 2 -m regvq_fast tokens --views 2
pytest tests/test_readme.py::test_paths_exist --benchmark-only && tensorboard --logdir runs
```
"""
    assert mentioned_paths(text) == {
        "docs/failed-ideas.md",
        "kernels/*.py",
        "gone/module.py",
        "train/gone.py",
        "train/vq.py",
        "tests/test_readme.py",
    }
    assert mentioned_flags(text) == {"": {"--tau", "--gone"}, "train vq": {"--steps", "--out"}, "tokens": {"--views"}}
    with pytest.raises(SystemExit), redirect_stdout(io.StringIO()):
        parse("train vq", "--gone")
