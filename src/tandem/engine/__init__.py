"""The engine port and its adapters: `sglang` (the real one) and `simulated` (scale, faults, tests in seconds)."""
