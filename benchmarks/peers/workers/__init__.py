"""Fake workers: each speaks one system's own contract and costs little. An answer is a row of words of the model."""
