"""Inference engines: each module is a process that serves the OpenAI API on a unix socket."""
