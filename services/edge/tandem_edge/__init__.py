"""The HTTP edge: Envoy with a configuration rendered from settings and from the contracts."""
