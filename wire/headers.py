"""Headers that daemons send each other."""

JOB_ID_HEADER = "x-hive-job-id"
"""Carries the id that the daemon asked first has minted; makes a forwarded POST idempotent."""

QUEEN_HEADER = "x-hive-queen"
"""Says which queen listens to a hive's heartbeats."""
