"""The prefill service: computes prompts' KV and hands it to decode workers.

In reading order: __main__, config, app, servicer, prefill.
"""
