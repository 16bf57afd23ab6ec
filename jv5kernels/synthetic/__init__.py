"""Checkpoints with random weights in the real layouts, for tests, benches and the demo."""
