"""A script that is told by one dataclass: from its command line to the status it leaves with."""

import sys
from collections.abc import Callable
from typing import Any, TypeVar

from regvq_fast.ranks import is_for_others_to_say

Settings = TypeVar("Settings")


def run_script(
    kind: type[Settings], work: Callable[[Settings], Any], description: str, *, stopped: str = "stopped"
) -> None:
    """Parse the command line, do the work, and leave with one sentence and a status where that failed.

    Args:
        kind: a dataclass; its fields are the flags, and their docstrings the help.
        work: what the script is for. Its ValueError and OSError say in a sentence what is wrong, and are an exit
            status of 1; Ctrl-C is one of 130. What all ranks stop with, rank 0 says.
        description: heads the help.
        stopped: what is said after Ctrl-C, with fields in braces: "stopped; what was drawn is in {out}".
    """
    import tyro

    settings = tyro.cli(kind, args=sys.argv[1:], description=description)
    try:
        work(settings)
    except (ValueError, OSError) as error:
        sys.exit(1 if is_for_others_to_say(error) else f"error: {error}")
    except KeyboardInterrupt:
        print(stopped.format_map(vars(settings)), file=sys.stderr)
        sys.exit(130)
