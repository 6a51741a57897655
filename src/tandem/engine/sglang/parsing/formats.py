"""What Tandem knows of a format beyond SGLang's detector for it. Tables only.

docs/reference/openai-tools.md describes how SGLang's detectors fail without it.
"""

from __future__ import annotations

WHOLE_CALL_FORMATS = {"mistral": ("[TOOL_CALLS", ""), "interns1": ("<|action_start|> <|plugin|>", "<|action_end|>")}
"""Formats whose streaming detector loses calls -> the marker that starts the calls, and the one that ends each."""

FRAMED_FORMATS = frozenset({"beam", "gpt-oss", "inkling", "kimi_k3", "muse", "response_template"})
"""Formats whose detectors consume channel frames, which cannot be distinguished from lost text."""

JSON_FORMATS = frozenset(
    {
        *("qwen", "qwen25", "trinity", "hermes", "llama3", "mistral", "interns1", "cohere_command4", "json"),
        *("deepseekv3", "deepseekv31", "kimi_k2", "gpt-oss", "apertus2509", "gigachat3", "iquest_q1"),
    }
)
"""Formats in which a model writes the arguments as JSON text."""

FOLLOWED_FORMATS = JSON_FORMATS - {"gpt-oss", "iquest_q1"}
"""JSON formats in which a call ends with its JSON: in strings tags mean nothing, and pieces are batched."""

REFUSING_FORMATS = frozenset({"qwen", "qwen25", "trinity", "hermes", "json"})
"""Formats whose detectors leave the text of a call to an unknown tool complete, so that it becomes content."""

CLOSERS = {
    **dict.fromkeys(("qwen", "qwen25", "trinity"), "</tool_call>"),
    "deepseekv32": "</｜DSML｜function_calls>",
    "deepseekv4": "</｜DSML｜tool_calls>",
    "deepseekv41": "</｜DSML｜ calls>",
    "minimax-m2": "</minimax:tool_call>",
}
"""Formats whose detectors return the end of the calls as content if text follows -> that marker."""

TAGS = {
    **dict.fromkeys(("deepseekv32", "deepseekv4", "deepseekv41"), ("｜DSML｜",)),
    "minimax-m2": ("minimax:", "invoke", "parameter"),
    "hunyuan": ("tool_", "arg_"),
    "step3": ("steptml:", "｜tool"),
}
"""Formats of tags whose detectors read a call from its beginning at each piece -> what their tags contain."""
