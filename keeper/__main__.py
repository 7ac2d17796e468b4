"""``python -m keeper``: the ``hive`` command."""

from keeper.main import main

main()
