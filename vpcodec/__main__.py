"""The program: `vpcodec` and `python -m vpcodec`."""

from __future__ import annotations

import atexit
import gc

from .cli import main


def program() -> None:
    """Run the command line as a process of its own.

    The garbage collector would take a sixth of the time of a short command: with its usual
    thresholds it searches what has been imported again and again, and once more at the exit.
    """
    gc.set_threshold(50_000, 20, 20)
    atexit.register(gc.freeze)
    main()


if __name__ == "__main__":
    program()
