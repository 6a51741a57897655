"""How each role converts a leg to an engine request."""
