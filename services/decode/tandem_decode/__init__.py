"""The decode service: receives KV and streams tokens, or does both halves itself.

In reading order: __main__, config, app, servicer, decode.
"""
