"""Packages that SGLang imports and, on a CPU, never uses.

Not imported from here but under their own names, see `tandem.engine.sglang.environment`.

The adapter appends this directory to `sys.path`, behind everything that is installed, so a real package always wins.
"""
