"""Generated from protos/ by tools/gen_protos.py; not to be edited."""
