"""Runs the whole project on a GPU machine without network access: `python -m tools.gpu`, see docs/evidence/gpu.md.

Owns the packaging of dependencies for such a machine, and the measurements there. How files and commands reach the
machine is not part of it.
"""
