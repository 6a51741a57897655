"""What deployment files may set: the settings of each service, and how long its drain takes.

Shared by the tests of the files below `deploy/`, of the Dockerfiles and of docker-compose.yml.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from tandem_decode.config import DecodeConfig
from tandem_edge.config import EdgeConfig
from tandem_frontend.config import FrontendConfig
from tandem_prefill.config import PrefillConfig
from tandem_registry.config import RegistryConfig

from tandem.config import ServiceConfig

REPOSITORY = Path(__file__).parents[3]
CONFIGS: dict[str, type[ServiceConfig]] = {
    "registry": RegistryConfig,
    "frontend": FrontendConfig,
    "prefill": PrefillConfig,
    "decode": DecodeConfig,
    "edge": EdgeConfig,
}
VARIABLE = re.compile(r"TANDEM_(REGISTRY|FRONTEND|PREFILL|DECODE|EDGE)_([A-Z_]+)")


def drain_s(service: str) -> float:
    """Longest drain of a service without a setting for it."""
    fields = CONFIGS[service].model_fields
    return float(fields["drain_settle_s"].default) + float(fields["drain_timeout_s"].default)


def unknown_settings(names: Iterable[str]) -> list[str]:
    """Those of the variables that would stop a service, because it has no such setting."""
    found = []
    for name in names:
        variable = VARIABLE.fullmatch(name)
        if variable is None:
            continue
        service, key = variable[1].lower(), variable[2].lower()
        if key not in CONFIGS[service].model_fields:
            found.append(name)
    return found
