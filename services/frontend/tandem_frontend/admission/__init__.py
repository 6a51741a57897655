"""Step 2 of a request: it is admitted, queued or rejected by what the workers can hold."""
