"""The routing hop: which workers serve a request.

`candidates` says what is possible, `routes` what is preferred, `random_choice` decides among equals.
"""
