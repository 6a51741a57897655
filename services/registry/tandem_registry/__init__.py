"""The registry: which workers are alive, with role, address and epoch. Not on the request path."""
