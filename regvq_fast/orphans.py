"""Processes whose parent was killed, and which would run on."""

import multiprocessing
import os
import threading
from typing import Any

_LOOK_SECONDS = 2.0


def watch_parent(number: int) -> threading.Event:
    """Send this process a signal within seconds of its parent's end; a thread watches for that.

    Args:
        number: of the signal; SIGTERM lets a run save its work.

    Returns:
        Set it to end the watch.
    """
    over = threading.Event()
    arguments = (number, multiprocessing.parent_process(), os.getppid(), over)
    threading.Thread(target=_watch, args=arguments, daemon=True).start()
    return over


def _watch(number: int, parent: Any, parent_id: int, over: threading.Event) -> None:
    # The id alone doesn't show a parent that ended before this process asked for it.
    while (parent is None or parent.is_alive()) and os.getppid() == parent_id:
        if over.wait(_LOOK_SECONDS):
            return
    os.kill(os.getpid(), number)
