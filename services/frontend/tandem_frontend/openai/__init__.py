"""OpenAI's HTTP API: JSON bodies in, JSON or server-sent events out, on the same pipeline as every other request.

In reading order: servicer, request_body, schemas (with common_params and messages), translation, chat and completions,
handler, then what those share: chat_choice, logprobs, merge, response. `responses_api` and `tandem_frontend.anthropic`
translate to a chat request (history, field_names) and back (blocks, typed_events).
"""
