"""The CPU's kernels: C++ behind jax.ffi, compiled for the host at first use."""
