"""Compares Tandem's frontend with other systems' routers, in one run on one machine: `python -m benchmarks.peers`.

Cheap fake workers implement each system's own protocol, so that only the router or frontend between a client and its
workers is measured. No engine is involved.
"""
