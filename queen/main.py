"""Starting a queen."""

from __future__ import annotations

from queen.queen import Queen
from queen.settings import QueenSettings
from wire import log
from wire.addresses import on_loopback
from wire.serve import CannotStart, Stop, run, starting


def serve(settings: QueenSettings, *, exit_with_parent: bool = False) -> int:
    """Run a queen until she is asked to stop.

    :raises CannotStart: the port is taken, or there is no secret where one is needed
    """
    with starting("The queen"):
        log.configure(settings.log_level, settings.state_dir / "queen.log")
    far = [url for url in settings.hives if not on_loopback(url)]
    if far and settings.cluster_secret() is None:
        raise CannotStart(
            f"--hive {far[0]} is another machine, and without a cluster secret it cannot prove "
            "whose hive it is. Make one with 'hive secret new', and bring it there with 'hive "
            "secret set'."
        )
    listening = settings.listen("The queen", sockets=settings.processes)

    def make(stop: Stop) -> Queen:
        return Queen(settings, listening, stop)

    return run(make, listening, exit_with_parent=exit_with_parent)
