"""gRPC as Tandem uses it: one server shape, one channel policy, one error mapping, one translation of messages."""
