"""Latents that are written while the decoder goes on, on devices of the coprocessor's own.

The paper's asynchronous coprocessor (Liu et al. 2025, section 3.3, and its future work).
"""
