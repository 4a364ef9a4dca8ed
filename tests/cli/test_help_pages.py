"""The pages of help, which need no PyTorch, say what the parsers say.

`python tests/cli/test_help_pages.py` writes them.
"""

import io
import os
import re
import subprocess
import sys
import textwrap
import unicodedata
from collections import Counter
from contextlib import redirect_stdout
from pathlib import Path
from unittest.mock import patch

import pytest

from regvq_fast.cli.main import COMMANDS, PAGES, run

ROOT = Path(__file__).resolve().parents[2]
PLAIN = {"COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb"}


def parsers_help(name: str) -> str:
    """The help that the parser of a command prints at 80 columns."""
    with (
        patch.dict(os.environ, PLAIN),
        patch.object(sys, "argv", ["regvq"]),
        redirect_stdout(io.StringIO()) as text,
        pytest.raises(SystemExit),
    ):
        run(name, ["--help", "--help"])  # twice: not from the page
    shown = unicodedata.normalize("NFKD", text.getvalue()).encode("ascii", "ignore").decode()
    shown = "\n".join(_wrapped(line.rstrip()) for line in shown.strip().splitlines()) + "\n"
    # Of training commands, whose other flags have sections, -h would be a section of its own.
    return re.sub(r"\n{3,}", "\n\n", re.sub(r" options\n -+\n  -h, --help .*\n\n", "", shown))


def _wrapped(line: str) -> str:
    """Wrap a line of prose, which the parser leaves as long as it is; commands are indented and stay whole."""
    if len(line) <= 80 or line.startswith("    "):
        return line
    indent = "  " if line.startswith("- ") else ""
    return textwrap.fill(line, 80, subsequent_indent=indent, break_on_hyphens=False)


def words(text: str) -> Counter[str]:
    """Words and flags, whatever frames a version of the parser sets around them, and however it wraps them."""
    return Counter(re.sub(r"[^\x21-\x7e]+", " ", text).split())


@pytest.mark.parametrize("name", COMMANDS)
def test_pages_are_what_the_parsers_say(name: str) -> None:
    page = (PAGES / f"{name.replace(' ', '-')}.txt").read_text(encoding="utf-8")
    differ = words(page) - words(parsers_help(name)) | words(parsers_help(name)) - words(page)
    assert not differ, f"run python {Path(__file__).relative_to(ROOT)}"
    usage, _, flags = page.partition(" -----")
    assert max(map(len, flags.splitlines())) <= 80
    assert all(len(line) <= 80 or line.startswith("    ") for line in usage.splitlines())
    assert page.isascii()


def test_there_is_no_page_without_a_command() -> None:
    assert {path.stem for path in PAGES.iterdir()} == {name.replace(" ", "-") for name in COMMANDS}


@pytest.mark.parametrize("command", [["-m", "regvq_fast", "train", "vq"], ["train/vq.py"]])
def test_help_imports_no_torch(command: list[str]) -> None:
    found = subprocess.run(
        [sys.executable, "-X", "importtime", *command, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    imported = {line.rsplit("|", 1)[-1].strip() for line in found.stderr.splitlines()}
    assert not imported & {"torch", "numpy", "tyro"}
    started = "python train/vq.py" if command[0].endswith(".py") else "python -m regvq_fast train vq"
    assert f"usage: {started}" in found.stdout
    assert "--num-codes" in found.stdout


if __name__ == "__main__":
    PAGES.mkdir(exist_ok=True)
    for command_name in COMMANDS:
        page = PAGES / f"{command_name.replace(' ', '-')}.txt"
        page.write_text(parsers_help(command_name), encoding="utf-8")
