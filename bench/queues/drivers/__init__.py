"""How each queue is asked: a program each, run in its own environment.

What they share is :mod:`bench.queues.driver`.
"""
