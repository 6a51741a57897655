"""Pure value types and state machines: what a request, a token batch and a worker are.

Imports the standard library only, so that every rule here can be tested and simulated without I/O.
"""
