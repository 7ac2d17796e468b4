"""What a signal does to a command that has children: first it ends the command, then it hurries."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from keeper.child import Child

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupts:
    """========= ====================================================
    signal    what happens
    ========= ====================================================
    first     the task is cancelled; its children stop in order
    second    the children are told to finish nothing any more
    third     the children are killed
    ========= ====================================================
    """

    def __init__(self, task: asyncio.Task[object]) -> None:
        self.count = 0
        self.children: list[Child] = []
        self._task = task

    def __call__(self) -> None:
        self.count += 1
        match self.count:
            case 1:
                self._task.cancel()
            case 2:
                for child in self.children:
                    child.stop()
            case _:
                for child in self.children:
                    child.kill()


@contextmanager
def interrupts() -> Iterator[Interrupts]:
    """SIGINT, SIGTERM and SIGHUP, for the current task."""
    task = asyncio.current_task()
    assert task is not None
    handler = Interrupts(task)
    loop = asyncio.get_running_loop()
    for number in SIGNALS:
        loop.add_signal_handler(number, handler)
    try:
        yield handler
    finally:
        for number in SIGNALS:
            loop.remove_signal_handler(number)
