"""The routing hop: which workers serve a request.

`pools` keeps what is possible, `routes` decides what is preferred, a `policy` chooses among equals.
"""
