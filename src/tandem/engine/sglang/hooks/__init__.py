"""Hooks into SGLang's own processes: KV accounting, seeded sampling, grammars."""
