"""The command `regvq`. It imports a command's module, and with it PyTorch, only to run the command.

The folder help/ has the help of each command, as the parser prints it at 80 columns, so that it appears without that
import. `python tests/cli/test_help_pages.py` writes these pages.
"""

import difflib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from regvq_fast.invocation import as_typed, command, install
from regvq_fast.streams import survive_lost_output
from regvq_fast.version import __version__


class Command(NamedTuple):
    """A command of `regvq`."""

    module: str
    """Module in regvq_fast.cli, whose ``main(args)`` runs it."""
    summary: str
    """Line of the help."""


COMMANDS = {
    "train vq": Command("train", "Train an image tokenizer"),
    "train ar": Command("train", "Train the autoregressive prior: images from maps or labels"),
    "train diffusion": Command("train", "Train the diffusion prior: images from captions or labels"),
    "train maskgit": Command("train", "Train the masked prior: images from maps or labels"),
    "tokens": Command("cache_tokens", "Encode a data set once, for the priors"),
    "sample": Command("sample", "Sample images from a prior"),
    "reconstruct": Command("reconstruct", "Pass images through a tokenizer, and save what comes back"),
    "encode": Command("encode", "Turn images into a file of tokens"),
    "decode": Command("decode", "Turn a file of tokens into images"),
    "export": Command("export", "Export a tokenizer as programs for PyTorch or ONNX Runtime"),
    "demo": Command("demo", "Open a web page to use a tokenizer and its priors"),
    "evaluate": Command("evaluate", "Measure a tokenizer or sampled images"),
    "data": Command("data", "Check the paper's data sets, or pack them into shards"),
    "push": Command("push", "Publish a run on the Hugging Face Hub, with a model card"),
    "paper": Command("paper", "Reproduce a table or a sweep of the paper"),
}
"""Commands by name."""


PAGES = Path(__file__).with_name("help")


def main() -> None:
    """Run the command line of `regvq`."""
    survive_lost_output(warns=not {"-h", "--help"} & set(sys.argv))
    words, args = _split(sys.argv[1:])
    if args[:1] in (["--version"], ["-V"]):
        print(f"regvq_fast {__version__}")
    elif words in COMMANDS:
        run(words, args)
    elif not args or args[0] in ("-h", "--help"):
        print(_help(words))
        sys.exit(0 if args else 2)
    else:
        sys.exit(_unknown(words, args[0]))


def run(name: str, args: Sequence[str] | None = None) -> None:
    """Run a command.

    Args:
        name: one of `COMMANDS`.
        args: after the command; None: those of this process.
    """
    args = list(sys.argv[1:] if args is None else args)
    survive_lost_output(warns=not {"-h", "--help"} & set(args))
    page = PAGES / f"{name.replace(' ', '-')}.txt"
    # If PyTorch is already imported, a program may have registered a quantizer with its own settings.
    if args in (["-h"], ["--help"]) and "torch" not in sys.modules and page.is_file():
        print(as_typed(page.read_text(encoding="ascii")), end="")
        sys.exit(0)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads slow down shared cores
    try:
        with _ending_at_once():
            module = import_module(f"regvq_fast.cli.{COMMANDS[name].module}")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "regvq_fast":
            raise
        sys.exit(f"error: {command(name)} needs {error.name}: {install('train')}")
    except OSError as error:  # of a package that looks for a temporary folder, or for a library
        sys.exit(f"error: {command(name)} can't start: {error}")
    module.main([*name.split()[1:], *args])


@contextmanager
def _ending_at_once() -> Iterator[None]:
    """Let Ctrl-C end this process in the block, unless a program has a handler of its own.

    Imports of compiled modules turn its exception into an ImportError.
    """
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _split(args: Sequence[str]) -> tuple[str, list[str]]:
    """Return the name of the command and the arguments after it."""
    groups = {name.split()[0] for name in COMMANDS if " " in name}
    count = 2 if args[:1] and args[0] in groups and args[1:] and not args[1].startswith("-") else 1
    words = " ".join(args[:count])
    if words in COMMANDS:
        return words, list(args[count:])
    return (args[0], list(args[1:])) if args[:1] and args[0] in groups else ("", list(args))


def _help(group: str) -> str:
    names = [name for name in COMMANDS if not group or name.startswith(f"{group} ")]
    width = max(map(len, names))
    lines = [f"usage: {command(group or 'COMMAND')} {'COMMAND ' if group else ''}[flags]", ""]
    if not group:
        lines += ["Train, use and measure image tokenizers with regularized vector quantization.", ""]
    lines += [f"  {name:{width}}  {COMMANDS[name].summary}" for name in names]
    return "\n".join([*lines, "", "Add --help to a command to list its flags."])


def _unknown(group: str, word: str) -> str:
    given = f"{group} {word}".strip()
    near = difflib.get_close_matches(given, COMMANDS, 1, 0.5)
    hint = f"did you mean {command(near[0])}?" if near else f"{command('--help')} lists them"
    return f"error: there is no command {given!r}; {hint}"
