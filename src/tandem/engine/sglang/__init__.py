"""The real engine: SGLang in this process, its scheduler in a child process, KV over NIXL.

The only package of the project in which SGLang or NIXL may be imported or named. In the order of a start: `probe`,
`environment`, `arguments`, `launch` and `children` (with `plugin`, `platform`, `hooks` and `transfers` in SGLang's own
process), `figures`; then, for every request, `requests` and `answers`. Importing it imports no SGLang: that waits for
`SglangEngine.start`.
"""
