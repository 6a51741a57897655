"""OpenAI's Responses API on the same messages, tools, grammars and sampling as chat completions.

In reading order: schemas (with items), namespaces, translation, output, handler.
"""
