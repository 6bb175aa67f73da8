"""Compile gates: every kernel through the real TPU and GPU compilers, on a machine without either."""
