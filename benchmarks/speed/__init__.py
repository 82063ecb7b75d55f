"""What `benchmarks/kernels.py` is made of: one layer's decode step, the operations on it, and rivals."""
