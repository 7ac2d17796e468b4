"""Starting a hive agent."""

from __future__ import annotations

from hive_agent.agent import Agent
from hive_agent.settings import AgentSettings
from wire import log
from wire.guard import refuse_open_host
from wire.serve import Stop, bind, run, starting


def serve(settings: AgentSettings, *, exit_with_parent: bool = False) -> int:
    """Run the agent of this machine until it is asked to stop.

    :raises CannotStart: the port is taken, or another agent uses the state folder
    """
    with starting("The hive agent"):
        log.configure(settings.log_level, settings.state_dir / "agent.log")
    refuse_open_host(settings.host)
    listener = bind(settings.host, settings.port, "The hive agent")

    def make(stop: Stop) -> Agent:
        with starting("The hive agent"):
            return Agent(settings, stop)

    return run(make, listener, exit_with_parent=exit_with_parent)
