"""The simulated engine: SGLang-shaped timing, KV accounting and a real rendezvous, with hashes for tokens.

Needs the model directory (for digests, vocabulary and KV shape) but neither torch nor SGLang.
"""
