"""Parses tool calls and reasoning out of a model's output stream: the client side, without SGLang or gRPC imports.

The parsers are SGLang's own and run in a child process (`tandem.engine.sglang.parsing`), which returns deltas.
"""

from tandem.output_parsers.deltas import Content, Delta, Reasoning, ToolCallArguments, ToolCallStart
from tandem.output_parsers.parsed_stream import ParsedStream
from tandem.output_parsers.pool import Parsers, ToolChoice

__all__ = [
    "Content",
    "Delta",
    "ParsedStream",
    "Parsers",
    "Reasoning",
    "ToolCallArguments",
    "ToolCallStart",
    "ToolChoice",
]
