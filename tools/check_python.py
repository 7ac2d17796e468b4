"""Says in words, before anything is installed, when this Python will not do."""

import sys

if sys.version_info < (3, 11):  # noqa: UP036  # this file must run on older ones
    found = sys.version.split()[0]
    sys.exit("Hive needs Python 3.11 or newer, not " + found + ". Try 'make PYTHON=python3.12'.")
try:
    import ensurepip  # noqa: F401  # what the venv module needs
except ImportError:
    sys.exit("This Python has no venv. On Debian and Ubuntu: apt install python3-venv")
