"""Routing: which workers serve a request.

`pools` indexes the possible routes, `router` narrows them to the preferred ones, a `policy` picks one of those.
"""
