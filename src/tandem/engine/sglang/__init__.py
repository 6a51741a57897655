"""The real engine: SGLang in this process, its scheduler in a child process, KV over NIXL.

The only package of the project in which SGLang or NIXL may be imported or named. In start order: `compat`,
`environment`, `arguments`, `launch` and `children` (with `plugin` and `hooks` in SGLang's scheduler process),
`capabilities`; then, for every request, `requests` and `responses`. Importing this package does not import SGLang;
`SglangEngine.start` does.
"""
