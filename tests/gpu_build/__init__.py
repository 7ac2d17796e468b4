"""A folder to put before the others on ``PYTHONPATH``: ``xllamacpp`` in a build for GPUs."""
