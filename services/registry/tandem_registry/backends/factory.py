"""The backend that the settings select.

Owns the mapping from settings. Imports the Consul client only when Consul is used.
"""

from __future__ import annotations

from tandem_registry.backends.memory import MemoryBackend
from tandem_registry.backends.port import Backend
from tandem_registry.config import RegistryConfig


def open_backend(config: RegistryConfig) -> Backend:
    """The backend, not started."""
    if config.backend == "memory":
        return MemoryBackend(config.lease_ttl_s)
    from tandem_registry.backends.consul.backend import ConsulBackend
    from tandem_registry.backends.consul.settings import ConsulSettings

    settings = ConsulSettings(
        address=config.consul_address,
        service=config.consul_service,
        token="" if config.consul_token is None else config.consul_token.get_secret_value(),
        token_file=config.consul_token_file,
        ca=config.consul_ca,
        cert=config.consul_cert,
        key=config.consul_key,
        has_checks=config.consul_checks,
    )
    return ConsulBackend(settings, config.lease_ttl_s, checks_tls=config.tls is not None)
