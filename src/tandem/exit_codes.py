"""Exit codes of every Tandem process and command. Imports nothing, so that it is loaded before signals are handled."""

from __future__ import annotations

EXIT_FAILED = 1
EXIT_CONFIG = 2
"""A setting or option is wrong: a restart with the same settings fails again."""
EXIT_SECOND_SIGNAL = 70
"""A second signal cut the drain short."""
EXIT_INTERRUPTED = 130
"""SIGINT, as a shell reports it: 128 + 2."""
EXIT_TERMINATED = 143
"""SIGTERM before the process served: 128 + 15."""
