"""Engines in environments of their own: what can be installed, what is, what is wrong with it."""

from hive_agent.engines.engines import Chosen, Engines

__all__ = ["Chosen", "Engines"]
