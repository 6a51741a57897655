"""Step 1 of a request: what the client asked for is checked, rendered, tokenized and completed with defaults."""
