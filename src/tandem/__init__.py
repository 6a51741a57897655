"""Tandem: large language models served with prefill and decode disaggregated, as gRPC microservices."""

__version__ = "0.1.0"
