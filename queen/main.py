"""Starting a queen."""

from __future__ import annotations

from queen.queen import Queen
from queen.settings import QueenSettings
from wire import log
from wire.serve import Stop, run, starting


def serve(settings: QueenSettings, *, exit_with_parent: bool = False) -> int:
    """Run a queen until she is asked to stop.

    :raises CannotStart: the port is taken
    """
    with starting("The queen"):
        log.configure(settings.log_level, settings.state_dir / "queen.log")
    listening = settings.listen("The queen")

    def make(stop: Stop) -> Queen:
        return Queen(settings, listening, stop)

    return run(make, listening, exit_with_parent=exit_with_parent)
