"""The parser host: SGLang's tool call and reasoning parsers, in a child process of the frontend.

They import PyTorch, which no frontend may. In start order: `names` (checks the parser names), `host` (the loop over
standard input); then, per stream, `stream` (splits text independently of how it arrives), `reasoning`,
`tool_text` or `whole_calls`; and `grammar`, which builds the engine's constraint. The client end of its pipes is
`tandem.output_parsers`.
"""
