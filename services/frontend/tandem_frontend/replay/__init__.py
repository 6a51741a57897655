"""Replay: a trace of requests through the frontend's own admission and routing, against accounted engines.

No part of a serving frontend. `simulation` runs it in virtual time, `tandem replay` is its command.
"""
