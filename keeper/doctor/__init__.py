"""``hive doctor``: what is well on this machine and between the machines, and what is not."""
