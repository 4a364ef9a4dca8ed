"""Token caches made by train/cache_tokens.py, and their files."""

from pathlib import Path

from helpers.runs import run_script


def cache(tokenizer: Path, out: Path, *flags: object) -> Path:
    run_script("--tokenizer", tokenizer, "--out", out, *flags, script="cache_tokens.py")
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
