"""The models on a machine's disk: what they are, where they lie, how they get there."""
