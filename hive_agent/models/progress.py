"""How far a download is, for people: a line at most twice a second."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

INTERVAL_S = 0.5
WINDOW_S = 5.0
"""The rate is that of the last seconds, so that a stall shows."""


@dataclass(frozen=True)
class Progress:
    """One moment of a download.

    :param file: the file, or the repository and how many of its files there are
    :param done_bytes: what is on disk, what was there before included
    :param rate: bytes per second from the network, over the last 5 s
    :param note: what else to know, such as that the connection was lost
    """

    file: str
    done_bytes: int
    total_bytes: int
    rate: float
    note: str = ""

    @property
    def seconds_left(self) -> float | None:
        """None while nothing comes in."""
        return (self.total_bytes - self.done_bytes) / self.rate if self.rate > 0 else None


def describe(progress: Progress) -> str:
    """``Qwen3-0.6B-Q8_0.gguf 45 % (287.3 of 639.4 MB, 21.4 MB/s, 16 s left)``."""
    done, total = progress.done_bytes, progress.total_bytes
    percent = 100 if total == 0 else int(100 * done / total)
    done_size, total_size = human_size(done), human_size(total)
    if done_size.split(" ")[1] == total_size.split(" ")[1]:
        done_size = done_size.split(" ")[0]
    facts = [total_size if done >= total else f"{done_size} of {total_size}"]
    if progress.rate > 0:
        facts.append(f"{human_size(progress.rate)}/s")
    if done < total and (left := progress.seconds_left) is not None:
        facts.append(f"{_human_time(left)} left")
    note = f"; {progress.note}" if progress.note else ""
    return f"{progress.file} {percent} % ({', '.join(facts)}){note}"


def human_size(count: float) -> str:
    """Bytes as people read them: ``639.4 MB``, powers of 1000."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} bytes"


def _human_time(seconds: float) -> str:
    if seconds < 100:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


class Meter:
    """Adds up the bytes of all files of a download and reports them, not too often.

    :param report: called in the event loop; what it raises ends the download
    """

    def __init__(
        self,
        file: str,
        total_bytes: int,
        report: Callable[[Progress], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._file = file
        self._total = total_bytes
        self._report = report
        self._clock = clock
        self._done = 0
        self._fetched = 0
        self._samples: deque[tuple[float, int]] = deque([(clock(), 0)])
        self._reported_at = -INTERVAL_S

    def found(self, count: int) -> None:
        """Bytes that were on disk already; negative where they turned out to be useless."""
        if count:
            self._done += count
            self._maybe_report()

    def fetched(self, count: int) -> None:
        """Bytes that came in."""
        self._done += count
        self._fetched += count
        self._maybe_report()

    def say(self, note: str) -> None:
        """Report at once, with a note."""
        self._send(note)

    def finish(self) -> None:
        """The last report: everything is there."""
        self._done = self._total
        self._send("")

    def _maybe_report(self) -> None:
        if self._clock() - self._reported_at >= INTERVAL_S:
            self._send("")

    def _send(self, note: str) -> None:
        now = self._reported_at = self._clock()
        self._samples.append((now, self._fetched))
        while len(self._samples) > 2 and now - self._samples[1][0] >= WINDOW_S:
            self._samples.popleft()
        began, before = self._samples[0]
        rate = (self._fetched - before) / (now - began) if now > began else 0.0
        done = min(max(self._done, 0), self._total)
        self._report(Progress(self._file, done, self._total, rate, note))
