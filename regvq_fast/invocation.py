"""Commands as the user types them, which depends on how this process was started."""

import re
import sys
from pathlib import Path

SCRIPTS = {
    "train vq": "vq.py",
    "train ar": "ar.py",
    "train diffusion": "diffusion.py",
    "train maskgit": "maskgit.py",
    "tokens": "cache_tokens.py",
    "sample": "sample.py",
    "evaluate": "evaluate.py",
    "data": "data.py",
    "paper": "paper.py",
}
"""Scripts in train/, by the command that they run."""

_COMMAND = re.compile(r"(-m regvq_fast|regvq) ((?:train )?[a-z]+)")


def command(name: str) -> str:
    """Return a command as the user types it, without flags.

    Args:
        name: "train vq", "sample", ...

    Returns:
        "regvq train vq"; "python train/vq.py" if a script in that folder was started and the command has one;
        "python -m regvq_fast train vq" if the module was started.
    """
    return _script(name, "python ") or ("python -m " if _is_module() else "") + _package(name)


def launched(name: str, processes: int) -> str:
    """Return a command as the user types it to run several processes on this machine."""
    return f"torchrun --nproc-per-node {processes} {_script(name) or f'-m regvq_fast {name}'}"


def as_typed(text: str) -> str:
    """Return a text with its commands, such as "regvq sample", as the user types them."""

    def spelling(match: re.Match[str]) -> str:
        if match[1] != "regvq":  # after torchrun
            return _script(match[2]) or match[0]
        return command(match[2])

    return _COMMAND.sub(spelling, text)


def install(extra: str) -> str:
    """Return the command that installs an optional part of the package."""
    from_checkout = (Path(__file__).parents[1] / "pyproject.toml").is_file()
    return f'pip install -e ".[{extra}]"' if from_checkout else f'pip install "regvq-fast[{extra}]"'


def _script(name: str, before: str = "") -> str:
    """Return the script of a command, in the folder of the started script; "" if either is missing."""
    started = Path(sys.argv[0] if sys.argv else "")
    if started.name not in SCRIPTS.values() or name not in SCRIPTS:
        return ""
    script, here = started.with_name(SCRIPTS[name]), Path.cwd()
    return before + str(script.relative_to(here) if script.is_relative_to(here) else script)


def _package(name: str) -> str:
    return f"{'regvq_fast' if _is_module() else 'regvq'} {name}"


def _is_module() -> bool:
    return bool(sys.argv) and Path(sys.argv[0]).name == "__main__.py"
