"""Starting a hive agent."""

from __future__ import annotations

from hive_agent.agent import Agent
from hive_agent.settings import AgentSettings
from wire import log
from wire.serve import Stop, run, starting


def serve(settings: AgentSettings, *, exit_with_parent: bool = False) -> int:
    """Run the agent of this machine until it is asked to stop.

    :raises CannotStart: the port is taken, or another agent uses the state folder
    """
    with starting("The hive agent"):
        log.configure(settings.log_level, settings.state_dir / "agent.log")
    listening = settings.listen("The hive agent")

    def make(stop: Stop) -> Agent:
        with starting("The hive agent"):
            return Agent(settings, listening, stop)

    return run(make, listening, exit_with_parent=exit_with_parent)
