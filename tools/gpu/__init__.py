"""Runs the whole project on a GPU machine that reaches no network: `python -m tools.gpu`, see docs/evidence/gpu.md.

Owns the way of packages to such a machine, and what is measured there. Knows nothing of who lends the machine, nor how
files and commands get to it.
"""
