"""OpenAI's Files and Batch APIs on a directory that all frontends of a cluster share."""
