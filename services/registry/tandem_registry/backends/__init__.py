"""Where membership is kept: one port, and an adapter for each place."""
