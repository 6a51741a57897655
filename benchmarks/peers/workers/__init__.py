"""Fake workers: each implements one system's own protocol at little CPU cost. Responses are words of the vocabulary."""
