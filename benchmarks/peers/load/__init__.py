"""The clients: a closed loop of streams in a process of its own, with its own clock, at little cost."""
