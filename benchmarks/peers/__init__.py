"""Tandem's frontend beside its peers, in one run on one machine: `python -m benchmarks.peers`.

Lean fake workers speak each system's own contract, so that only the front is measured: the router or frontend between
a client and its workers. Measures nothing of an engine.
"""
