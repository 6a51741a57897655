"""The prefill service: computes the KV of prompts and transfers it to decode workers.

In reading order: __main__, config; then `tandem.worker.app` and `tandem.worker.roles.prefill`.
"""
