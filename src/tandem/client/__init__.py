"""Calls between processes and from tools: one function for each RPC, failures as TandemError."""
