"""Limits that several processes check: the client's contract, the legs' contract and the settings must agree on them.

A limit that one module alone checks stays in that module.
"""

from __future__ import annotations

PORT_MAX = 65_535
REQUEST_ID_CHARS_MAX = 128
"""Also in every leg and every look-up of a trace."""
MODEL_NAME_CHARS_MAX = 128
"""The name that clients request."""
PROMPT_LOGPROBS_MAX = 65_536
"""Most log probabilities of one prompt: a token counts once, and once more for each of its most likely ones.

They travel in one message, of about a megabyte.
"""
TOP_LOGPROBS_MAX = 20
"""Alternatives per token, as in OpenAI's API."""
