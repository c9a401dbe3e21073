"""The torch engine's inner loops, each with a plain-torch reference that defines it.

A floor of its own: torch and triton only, never batchgen, so that it runs on a bare GPU machine. The folder above must
never become importable as `kernels`, which would break transformers (tests/test_kernels_layout.py says how).
"""
