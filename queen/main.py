"""Starting a queen."""

from __future__ import annotations

from queen.queen import Queen
from queen.settings import QueenSettings
from wire import log
from wire.guard import refuse_open_host
from wire.serve import bind, run, starting


def serve(settings: QueenSettings, *, exit_with_parent: bool = False) -> int:
    """Run a queen until she is asked to stop.

    :raises CannotStart: the port is taken
    """
    with starting("The queen"):
        log.configure(settings.log_level, settings.state_dir / "queen.log")
    refuse_open_host(settings.host)
    listener = bind(settings.host, settings.port, "The queen")
    return run(lambda stop: Queen(settings, stop), listener, exit_with_parent=exit_with_parent)
