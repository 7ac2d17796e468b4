"""Where daemons listen unless they are told otherwise."""

QUEEN = 7833
HIVE = 7835
