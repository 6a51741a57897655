"""Tool calls and reasoning, told from content while a model writes: the side that imports neither SGLang nor gRPC.

The parsers are SGLang's own and run in a child process (`tandem.engine.sglang.parsing`); what they say comes as deltas.
"""

from tandem.output_parsers.deltas import Content, Delta, Reasoning, ToolCallArguments, ToolCallStart
from tandem.output_parsers.pool import ParsedStream, Parsers, ToolChoice

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
