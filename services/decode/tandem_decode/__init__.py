"""The decode service: receives KV and streams tokens, or (aggregated) runs prefill and decode itself.

In reading order: __main__, config; then `tandem.worker.app` and `tandem.worker.roles.decode`.
"""
