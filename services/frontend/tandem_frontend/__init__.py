"""The frontend service: the door for clients, from text to text.

In reading order: __main__, config, app, servicer, generation (the whole way of a request), then its hops: validation,
chat_template, tokenization, admission, routing, dispatch, supervision, relay, detokenization, stopping.
"""
