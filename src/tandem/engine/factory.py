"""Selects the engine adapter by name and imports only that one, so that a simulated worker needs no SGLang."""

from __future__ import annotations

from tandem.engine.port import Engine
from tandem.engine.settings import EngineSettings
from tandem.errors import ConfigError

ENGINES = ("sglang", "simulated")


def create_engine(name: str, settings: EngineSettings) -> Engine:
    """Construct an engine; it is not started.

    Raises:
        ConfigError: unknown adapter name.
    """
    if name == "sglang":
        from tandem.engine.sglang.engine import SglangEngine

        return SglangEngine(settings)
    if name == "simulated":
        from tandem.engine.simulated.engine import SimulatedEngine

        return SimulatedEngine(settings)
    raise ConfigError("engine", f"must be one of {', '.join(ENGINES)}, not {name!r}")
