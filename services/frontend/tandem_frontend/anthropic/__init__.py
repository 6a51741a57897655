"""Anthropic's Messages API, on the chat completions of `tandem_frontend.openai`: messages, tools, grammars, sampling.

In reading order: servicer, schemas (with content), translation, output, handler, error_object.
"""
