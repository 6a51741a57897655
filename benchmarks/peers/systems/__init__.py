"""The systems measured: how each is started before fake workers of its own, and which of its processes count."""
