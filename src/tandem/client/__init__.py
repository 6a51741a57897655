"""gRPC clients for processes and tools: one function per RPC; failures are raised as TandemError."""
