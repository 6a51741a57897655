"""Measurements. Each prints its figures; README.md keeps them beside the command."""
