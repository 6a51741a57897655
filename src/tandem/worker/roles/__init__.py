"""What each role does with a leg: its request to the engine."""
