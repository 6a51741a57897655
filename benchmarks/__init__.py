"""Benchmarks. Each prints its results; README.md records them with the command."""
