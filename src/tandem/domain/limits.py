"""Limits that several processes check: the client's contract, the legs' contract and the settings must agree on them.

A limit that one module alone checks stays in that module.
"""

from __future__ import annotations

PORT_MAX = 65_535
REQUEST_ID_CHARS_MAX = 128
"""Also in every leg and every look-up of a trace."""
MODEL_NAME_CHARS_MAX = 128
"""The name that clients request."""
TOP_LOGPROBS_MAX = 20
"""Alternatives per token, as in OpenAI's API."""
