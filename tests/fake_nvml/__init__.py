"""An NVIDIA driver's library for machines without one, and what plays with it."""
