"""Where membership is stored: one port, and an adapter for each store."""
