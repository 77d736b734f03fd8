"""The operators on NVIDIA GPUs, compiled by Numba (numba-cuda)."""
