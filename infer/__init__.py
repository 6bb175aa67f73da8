"""Inference: sampling, generation, scoring, the alignment report."""
