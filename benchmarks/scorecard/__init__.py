"""Sixteen failures of a serving fleet, each with its measured effect on clients: `python -m benchmarks.scorecard`."""
