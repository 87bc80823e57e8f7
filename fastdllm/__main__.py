"""The command `fastdllm`, also as `python -m fastdllm`: cli.py inside a process of its own."""

import os
import signal
import sys


def main() -> int:
    """Run the command line on the process's arguments; returns the exit code.

    SIGINT ends it with 130 and SIGTERM with 143 (128 + the signal), without a traceback. While
    torch is imported, for seconds, there is nothing to clean up and the process leaves at once;
    later the terminal is put back first.
    """
    _on_signals(_leave)
    from .cli import main as run

    _on_signals(_unwind)
    return run()


def _on_signals(handler) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        # One that is ignored (the shell's nohup, a background job) stays so.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def _leave(number, frame):
    os._exit(128 + number)


def _unwind(number, frame):
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
