"""The sources of `jinn._native`, the C++ kernels."""
