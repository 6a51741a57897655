"""Stand-ins for packages that SGLang imports but does not use on a CPU.

They are imported under their own names, not from here: `tandem.engine.sglang.environment` appends this directory to
the end of `sys.path`, so that an installed package takes precedence.
"""
