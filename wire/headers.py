"""Headers that daemons send each other."""

JOB_ID_HEADER = "x-hive-job-id"
"""Carries the id that the daemon asked first has minted; makes a forwarded POST idempotent."""

QUEEN_HEADER = "x-hive-queen"
"""Says which queen listens to a hive's heartbeats."""

SESSION_HEADER = "x-hive-session"
"""The signature of a daemon's request: ``session:number:sha256 of the body:hmac``."""
