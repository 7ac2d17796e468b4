"""Logs: what is said is written, whoever says it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SPEAK = """
import logging, sys, threading
from pathlib import Path
from wire import log
log.configure("info", Path(sys.argv[1]))
def speak(who):
    for nr in range(2000):
        log.outcome("job", who=who, nr=nr)
speakers = [threading.Thread(target=speak, args=(who,)) for who in range(4)]
for one in speakers: one.start()
for one in speakers: one.join()
log.outcome("job", status="last")
logging.getLogger("hive").warning("this takes all along")
sys.stdin.read()
"""


def test_no_line_is_lost_and_each_thread_s_keep_their_order(tmp_path: Path) -> None:
    file = tmp_path / "hive.log"
    with subprocess.Popen(
        [sys.executable, "-c", SPEAK, str(file)],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as speaker:
        assert speaker.stderr is not None
        told = []
        for line in speaker.stderr:
            told.append(line.rstrip("\n"))
            if "this takes all along" in line:
                break
        written = file.read_text().splitlines()
        speaker.stdin.close()  # type: ignore[union-attr]
    assert written == told
    assert "status=last" in written[-2]
    heard: dict[str, list[int]] = {}
    for line in written[:-2]:
        said = dict(pair.split("=") for pair in line.split() if "=" in pair)
        heard.setdefault(said["who"], []).append(int(said["nr"]))
    assert heard == {str(who): list(range(2000)) for who in range(4)}, json.dumps(heard)[:500]


def test_a_line_that_follows_another_is_written_soon(tmp_path: Path) -> None:
    speak = """
import sys
from pathlib import Path
from wire import log
log.configure("info", Path(sys.argv[1]))
for nr in range(3):
    log.outcome("job", nr=nr)
sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", speak, str(tmp_path / "hive.log")],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as speaker:
        assert speaker.stderr is not None
        # It says no more, and does not end: so all of them come by themselves, or this hangs.
        lines = [speaker.stderr.readline() for _ in range(3)]
        speaker.stdin.close()  # type: ignore[union-attr]
    assert [line.split()[-1] for line in lines] == ["nr=0", "nr=1", "nr=2"]


def test_a_finalizer_that_logs_while_lines_are_written_breaks_nothing(tmp_path: Path) -> None:
    speak = """
import gc, logging, sys
from pathlib import Path
from wire import log
log.configure("info", Path(sys.argv[1]))
class Dying:
    def __init__(self): self.itself = self
    def __del__(self): logging.getLogger("hive").error("dying")
gc.disable()
for steps in range(1, 60):
    for nr in range(3):
        log.outcome("job", nr=nr)
    Dying()
    gc.set_threshold(gc.get_count()[0] + steps, 1000, 1000)
    gc.enable()
    logging.getLogger("hive").warning("these go along")
    gc.disable()
    gc.collect()
"""
    said = subprocess.run(
        [sys.executable, "-c", speak, str(tmp_path / "hive.log")],
        stderr=subprocess.PIPE,
        text=True,
        check=True,
    ).stderr
    assert "Error" not in said, said[-2000:]
    count = {word: said.count(word) for word in ("nr=", "dying", "these go along")}
    assert count == {"nr=": 3 * 59, "dying": 59, "these go along": 59}
