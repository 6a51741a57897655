"""LoRA adapters in SGLang, under the ids that all engines agree on; see `front_half`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tandem.domain.adapter import Adapter
from tandem.engine.settings import EngineSettings
from tandem.errors import AdapterRefused, ModelNotFound, NotSupported


async def load(settings: EngineSettings, manager: Any, adapter: Adapter, path: Path) -> None:
    """Load an adapter; see `engine.port`."""
    if settings.adapters is None:
        raise NotSupported("this engine was started without adapters")
    if settings.extra.get("dp_size", 1) != 1:
        raise NotSupported("SGLang loads no adapters with several data-parallel ranks (engine_extra.dp_size)")
    try:
        await manager.load_adapter(adapter.engine_id, str(path))
    except ValueError as problem:
        text = str(problem).replace(adapter.engine_id, adapter.name).replace(str(path), adapter.name)
        raise AdapterRefused(f"SGLang does not load adapter {adapter.name}: {text}", adapter=adapter.name) from None


async def unload(manager: Any, adapter: Adapter) -> None:
    """Release an adapter; see `engine.port`."""
    try:
        await manager.unload_adapter(adapter.engine_id)
    except ValueError as problem:
        text = str(problem).replace(adapter.engine_id, adapter.name)
        raise AdapterRefused(f"SGLang does not release adapter {adapter.name}: {text}", adapter=adapter.name) from None


def check(manager: Any, adapter: Adapter | None) -> None:
    """Reject a request of an adapter that is not loaded: SGLang's own error names no field.

    Raises:
        ModelNotFound
    """
    if adapter is not None and adapter.engine_id not in manager.lora_registry.get_all_adapters():
        raise ModelNotFound(f"adapter {adapter.name} is not loaded", model=adapter.name)
