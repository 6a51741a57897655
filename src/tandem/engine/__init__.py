"""The engine port and its adapters: `sglang` (the real engine) and `simulated` (for scale, faults and fast tests)."""
