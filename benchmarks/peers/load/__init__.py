"""The clients: a closed loop of streams in its own process, at little CPU cost."""
