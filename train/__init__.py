"""Training: data, optimiser, step, loop."""
