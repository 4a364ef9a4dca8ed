"""README.md can't drift from the project: its two commands, and every path and flag that it and the docs mention."""

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)

COMMANDS = [
    "pip install -c constraints.txt -e . && python train/vq.py --compile --amp",
    'pip install -c constraints.txt -e ".[test]" && pytest',
]
# Files by which a path counts as one of the repository even where its first folder doesn't exist (a renamed folder).
SOURCE_SUFFIXES = (".py", ".md", ".toml", ".sh", ".yaml")


def shell_commands(text: str) -> list[str]:
    """The simple commands of all bash blocks: comments dropped, continued lines joined, lists and pipes split."""
    blocks = "".join(body for language, body in FENCE.findall(text) if language == "bash")
    lines = re.sub(r"(^|\s)#.*", "", blocks.replace("\\\n", " ")).splitlines()
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
        and not word.startswith("runs/")
        and (("/" in word and word.split("/")[0] in folders) or word.endswith(SOURCE_SUFFIXES))
    }
    return paths | set(links)


def mentioned_flags(text: str) -> dict[str, set[str]]:
    """Flags by the script of train/ in whose command they stand; "" has those that stand alone in a code span."""
    flags: dict[str, set[str]] = {}
    for code in [*shell_commands(text), *code_spans(text)]:
        script = re.match(r"--|.*?(train/\w+\.py)", code)
        own = code[script.end() :] if script and script[1] else code  # what stands before is the launcher's
        if script and (found := re.findall(r"(?<!\S)--[a-z][\w-]*", own)):
            flags.setdefault(script[1] or "", set()).update(found)
    return flags


@functools.cache
def help_of(script: str) -> set[str]:
    """The flags that a script explains, started as users start it."""
    # Wide enough that the help wraps no flag, and without the terminal codes that could split one.
    environment = os.environ | {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    command = [sys.executable, script, "--help"]
    completed = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert completed.returncode == 0, completed.stderr
    return set(re.findall(r"--[a-z][\w-]*", completed.stdout))


@pytest.mark.parametrize("command", COMMANDS)
def test_command_stands_in_a_bash_block(command: str) -> None:
    lines = [line for language, body in FENCE.findall(TEXT) if language == "bash" for line in body.splitlines()]
    assert command in lines


def test_paths_exist() -> None:
    paths = mentioned_paths(TEXT)
    assert "train/vq.py" in paths
    assert sorted(path for path in paths if not any(ROOT.glob(path.rstrip("/")))) == []


@pytest.mark.parametrize(
    "document", ["README.md", "docs/training.md", "docs/data.md", "docs/priors.md", "docs/evaluation.md"]
)
def test_flags_exist(document: str) -> None:
    flags = mentioned_flags((ROOT / document).read_text(encoding="utf-8"))
    known = {f"train/{script.name}": help_of(f"train/{script.name}") for script in (ROOT / "train").glob("*.py")}
    for script, mentioned in flags.items():
        assert sorted(mentioned - (known[script] if script else set().union(*known.values()))) == [], script


def test_readers_find_what_drifts() -> None:
    text = """
See [the log](docs/failed-ideas.md#format), [the paper](https://example.org/paper.html), [below](#results), `images/s`.
`kernels/*.py`, `gone/module.py`, `train/gone.py`, `runs/NAME/metrics.jsonl`, `vgg16/vgg19`; `--tau 0.9` and `--gone`.

```bash
python train/vq.py --steps 3 \\
    --out runs/first  # not a --flag
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
    assert mentioned_flags(text) == {"": {"--tau", "--gone"}, "train/vq.py": {"--steps", "--out"}}
