"""The transformer: one pure function for decoder and coprocessor.

Axis letters, here and in `delib`: B sequences, T text tokens or cache slots, M traces, L latents, A
ahead tokens, S tokens of one trace, U those and earlier ones whose keys are given, N query heads, K
key/value heads, G = N / K, H head dim, D width, F feed-forward width, V vocabulary. Layers are
stacked on the first axis of every parameter and of the cache.
"""
