"""The registry: which workers are alive, in which role, where and in which epoch. Not on the path of any request."""
