"""A Triton backend named `cpu`: enough for Triton to be reported as available; kernels run interpreted."""
