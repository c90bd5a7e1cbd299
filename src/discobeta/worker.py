"""One of the processes that `launch` starts: a command that ends with the one that started it."""

from __future__ import annotations

import signal
import sys

from discobeta import cli, processes


def work(parent: int, words: list[str]) -> int:
    """`discobeta WORDS`, which ends with the process `parent`, however that ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's goes to the parent too, which ends this process
    if not processes.end_with(parent):
        return 128 + signal.SIGTERM
    status = cli.main(words)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # nothing is held any more: no exception while Python takes its leave
    return status


if __name__ == "__main__":
    sys.exit(work(int(sys.argv[1]), sys.argv[2:]))
