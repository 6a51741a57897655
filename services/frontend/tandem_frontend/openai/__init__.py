"""The OpenAI door: its JSON in, its JSON or server-sent events out, over the same hops as every other request.

In reading order: servicer, body, schemas, messages, translation, door, chat and completions, then what those two share:
choices, usage, logprobs, wire.
"""
