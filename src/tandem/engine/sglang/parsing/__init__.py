"""The parser host: SGLang's parsers of tool calls and reasoning, in a process of their own beside the frontend.

They import PyTorch, which no frontend may. In the order of a start: `names` (is there such a parser), `host` (the loop
over standard input); then, for every stream, `pieces` (text cut at the same places however it arrives), `stream`,
`reasoning`, `tool_text` or `whole_calls`; and `grammar` for what an engine must be held to. At the other end of its
pipes is `tandem.output_parsers`.
"""
