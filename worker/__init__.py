"""What an agent starts: the inference engines."""
