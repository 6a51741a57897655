"""litellm against a running edge: prints one JSON object of what it saw."""

import json
import sys
from typing import Any

import litellm


def main() -> None:
    """Ask whole, streamed, and for too much."""
    asked: dict[str, Any] = {
        "model": "openai/tandem-demo",
        "api_base": sys.argv[1],
        "api_key": "none",
        "messages": [{"role": "user", "content": sys.argv[2]}],
        "temperature": 0,
        "max_tokens": 40,
        "num_retries": 0,
    }
    litellm.suppress_debug_info = True
    whole = litellm.completion(**asked).choices[0].message.content
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in litellm.completion(**asked, stream=True))
    refused = ""
    try:
        litellm.completion(**{**asked, "messages": [{"role": "user", "content": "word " * 3000}]})
    except litellm.exceptions.ContextWindowExceededError as problem:
        refused = type(problem).__name__
    print(json.dumps({"whole": whole, "streamed": streamed, "refused": refused}))


main()
