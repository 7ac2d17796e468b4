"""Will it fit: how much memory a model will need, told before it is loaded.

``facts`` reads what matters from a GGUF header or a ``config.json``; ``llamacpp`` and ``vllm`` know
how each engine allocates; ``predict`` holds that against the devices as they are; ``advise`` looks
for the cheapest change where it does not fit; ``correction`` learns from loads that were measured.
All of it is pure: no file, no clock, no device is touched.
"""
