"""The op set: its definition in torch, and the recorder for the native kernels."""
