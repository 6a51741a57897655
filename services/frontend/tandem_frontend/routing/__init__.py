"""The routing hop: which workers serve a request. `candidates` says what is possible, `random_choice` decides."""
