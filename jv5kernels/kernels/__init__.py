"""Triton kernels, one file an operator. Importing one imports Triton: the operators do so on first use."""
