"""Checkpoints with random weights in the real layouts, for tests and benches."""
