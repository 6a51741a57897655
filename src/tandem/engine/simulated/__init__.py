"""The simulated engine: SGLang's scheduling, timing, KV accounting and bootstrap, with hashes instead of a model.

Needs the model directory (for digests, vocabulary and KV shape) but neither torch nor SGLang.
"""
