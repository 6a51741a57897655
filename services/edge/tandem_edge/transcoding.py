"""Protobuf descriptors and HTTP routes for Envoy, from the generated code that the frontends run with.

Owns the descriptor set and the route table. Both are built at start from the installed code, so they cannot drift from
it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from google.api import annotations_pb2
from google.protobuf import descriptor_pb2
from google.rpc import error_details_pb2, status_pb2

from tandem.api.frontend.v1 import (
    anthropic_service_pb2,
    batch_service_pb2,
    inference_service_pb2,
    openai_service_pb2,
)

SERVICES = (
    inference_service_pb2.DESCRIPTOR.services_by_name["InferenceService"],
    openai_service_pb2.DESCRIPTOR.services_by_name["OpenAiService"],
    anthropic_service_pb2.DESCRIPTOR.services_by_name["AnthropicService"],
    batch_service_pb2.DESCRIPTOR.services_by_name["BatchService"],
)
SERVICE_NAMES = tuple(service.full_name for service in SERVICES)
HEALTH_SERVICE_NAME = SERVICE_NAMES[0]
"""The service whose gRPC health decides whether Envoy sends requests to a frontend."""
ANTHROPIC_SERVICE_NAME = SERVICE_NAMES[2]
"""The service whose errors have Anthropic's form."""
ANTHROPIC_PATH = "/v1/messages"
"""Every HTTP path of that service begins with it."""
FILES = (
    inference_service_pb2,
    openai_service_pb2,
    anthropic_service_pb2,
    batch_service_pb2,
    error_details_pb2,
    status_pb2,
)
"""Without error_details Envoy cannot transcode the details of a status, and returns an empty body."""


@dataclass(frozen=True, slots=True, order=True)
class HttpRoute:
    """A path that HTTP clients can call."""

    path: str
    """The exact path, or its prefix."""
    is_prefix: bool
    methods: tuple[str, ...]
    is_foreign: bool = False
    """Whether it is a call of another project's API, whose clients add query parameters of their own."""
    is_upload: bool = False
    """Whether a POST is a multipart form, of any size, which the frontend reads as it comes."""
    query: tuple[str, ...] = ()
    """Query parameters of a foreign call that mean something."""


def descriptor_set() -> bytes:
    """A serialized FileDescriptorSet with every import before the files that import it."""
    collected: dict[str, descriptor_pb2.FileDescriptorProto] = {}

    def add(file: Any) -> None:
        if file.name in collected:
            return
        for needed in file.dependencies:
            add(needed)
        collected[file.name] = descriptor_pb2.FileDescriptorProto()
        file.CopyToProto(collected[file.name])

    for module in FILES:
        add(module.DESCRIPTOR)
    return descriptor_pb2.FileDescriptorSet(file=collected.values()).SerializeToString()


def http_routes() -> tuple[HttpRoute, ...]:
    """The paths of all google.api.http annotations, most specific first: exact paths before prefixes, long before
    short.
    """
    methods: dict[tuple[str, bool], set[str]] = {}
    foreign: set[str] = set()
    uploads: set[str] = set()
    queries: dict[str, set[str]] = {}
    for rule in _annotations():
        path, variable, _ = rule.template.partition("{")
        methods.setdefault((path, bool(variable)), set()).add(rule.method)
        if rule.is_foreign:
            foreign.add(path)
        if rule.is_upload:
            uploads.add(path)
        queries.setdefault(path, set()).update(rule.query)
    routes = [
        HttpRoute(path, is_prefix, tuple(sorted(found)), path in foreign, path in uploads, tuple(sorted(queries[path])))
        for (path, is_prefix), found in methods.items()
    ]
    return tuple(sorted(routes, key=lambda route: (route.is_prefix, -len(route.path), route.path)))


@dataclass(frozen=True, slots=True)
class _Rule:
    method: str
    template: str
    is_foreign: bool
    is_upload: bool
    query: tuple[str, ...]


def _annotations() -> Iterator[_Rule]:
    for service in SERVICES:
        is_foreign = service.full_name != HEALTH_SERVICE_NAME
        for method in service.methods:
            rule = method.GetOptions().Extensions[annotations_pb2.http]
            kind = rule.WhichOneof("pattern")
            if kind is None:
                continue
            template = getattr(rule, kind)
            # A variable at the end of the path, or of one segment and with a name behind it.
            if not re.fullmatch(r"/[a-z0-9/:._-]+(\{[a-z_]+=\*\*\}|\{[a-z_]+\}(/[a-z]+)?)?", template):
                raise AssertionError(f"{method.full_name}: unsupported path template {template}")
            # What neither the path nor the body holds comes from the query.
            fields = method.input_type.fields if is_foreign and not rule.body else ()
            query = tuple(field.name for field in fields if f"{{{field.name}" not in template)
            yield _Rule(kind.upper(), template, is_foreign, method.client_streaming, query)
