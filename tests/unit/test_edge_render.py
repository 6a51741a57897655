"""The edge's configuration: no value can become YAML structure, and the required parts are there."""

from __future__ import annotations

import functools
import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
import pytest
import yaml
from google.protobuf import descriptor_pb2, descriptor_pool
from google.rpc import code_pb2
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from tandem_edge import transcoding
from tandem_edge.config import EdgeConfig
from tandem_edge.endpoints import Endpoint, assignment
from tandem_edge.render import ERRORS_TEMPLATE, PARTS, SECRET_TEMPLATE, TEMPLATE, Files, quoted, render
from tandem_frontend.call_context import SESSION_HEADER

from tandem.domain.http_errors import ERROR_BY_CODE, ERRORS, ROWS
from tandem.errors import EngineFailed, ParserFailed
from tandem.service.api_keys import ApiKey

ENVOY_JITTER = 1.15
"""Envoy makes the time between two pings longer by up to so much."""
FILES = Files(directory=Path("/run/edge"))
TEXT = st.text(st.characters(exclude_categories=["Cs"]))
HOSTILE = "a\"}]\n- evil: {{ config }}\n#\\ \x85\u2028\x7f 🙂 ' & <b> %ENVIRONMENT(HOME)%"


def loaded(text: str | bytes) -> Any:
    return yaml.load(text, yaml.CSafeLoader)


def rendered(keys: tuple[ApiKey, ...] = (), **settings: Any) -> dict[str, Any]:
    config = EdgeConfig(**{"frontends": "127.0.0.1:1", **settings})
    found: dict[str, Any] = loaded(render(config, keys, FILES)[FILES.config])
    return found


def found(tree: Any, key: str) -> list[Any]:
    """Every value of a key, wherever it stands."""
    if isinstance(tree, dict):
        here = [tree[key]] if key in tree else []
        return here + [value for child in tree.values() for value in found(child, key)]
    return [value for child in tree for value in found(child, key)] if isinstance(tree, list) else []


def filters(tree: dict[str, Any]) -> list[str]:
    return [entry["name"].rsplit(".", 1)[1] for entry in found(tree, "http_filters")[0]]


@pytest.mark.parametrize("bound_s", [3, 10, 30, 86_400])
def test_a_client_that_vanished_is_given_up_within_the_bound(bound_s: float) -> None:
    tree = rendered(client_silence_timeout_s=bound_s)
    (options,) = found(tree, "socket_options")
    by_name = {option["description"]: option for option in options}
    assert {(name, option["level"], option["name"]) for name, option in by_name.items()} == {
        ("SO_KEEPALIVE", socket.SOL_SOCKET, socket.SO_KEEPALIVE),
        ("TCP_KEEPIDLE", socket.IPPROTO_TCP, socket.TCP_KEEPIDLE),
        ("TCP_KEEPINTVL", socket.IPPROTO_TCP, socket.TCP_KEEPINTVL),
        ("TCP_USER_TIMEOUT", socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT),
    }
    values = {name: option["int_value"] for name, option in by_name.items()}
    assert values["SO_KEEPALIVE"] == 1
    assert values["TCP_USER_TIMEOUT"] == bound_s * 1_000
    assert 0 < values["TCP_KEEPIDLE"] + 2 * values["TCP_KEEPINTVL"] <= bound_s
    (connections,) = found(found(tree, "listeners")[0], "connection_keepalive")
    interval_s, timeout_s = (float(connections[name].removesuffix("s")) for name in ("interval", "timeout"))
    assert interval_s * ENVOY_JITTER + timeout_s < bound_s


@given(
    st.recursive(
        st.text(st.characters(exclude_categories=["Cs"])) | st.integers() | st.booleans() | st.none(),
        lambda inner: st.lists(inner, max_size=3),
    )
)
def test_every_value_reads_back_as_itself(value: Any) -> None:
    line = str(quoted(value))
    assert line.isascii()
    assert "\n" not in line
    assert loaded(f"- x: {{y: {line}, z: 1}}\n") == [{"x": {"y": value, "z": 1}}]


@functools.cache
def shape_of_plain_paths() -> Any:
    return _shape(rendered(tls_cert="c", tls_key="k"))


@settings(max_examples=10, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1))
@example(HOSTILE)
def test_no_path_breaks_out_of_its_place(name: str) -> None:
    config = EdgeConfig(frontends="127.0.0.1:1", tls_cert=f"/tls/{name}", tls_key="/k")
    files = Files(directory=Path("/run") / name)
    contents = render(config, (), files)
    (secret,) = loaded(contents[files.secret("listener")])["resources"]
    assert secret["tls_certificate"]["certificate_chain"] == {"filename": str(Path(f"/tls/{name}"))}
    tree = loaded(contents[files.config])
    assert found(tree, "proto_descriptor") == [str(files.descriptors)]
    assert _shape(tree) == shape_of_plain_paths()


def _shape(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _shape(value) for key, value in tree.items()}
    return [_shape(child) for child in tree] if isinstance(tree, list) else None


def test_a_key_cannot_become_structure() -> None:
    keys = (ApiKey("alice", HOSTILE), ApiKey(HOSTILE, "k"))
    contents = render(EdgeConfig(frontends="127.0.0.1:1"), keys, FILES)
    assert found(json.loads(contents[FILES.keys]), "credentials") == [
        [{"client": "alice", "key": HOSTILE}, {"client": HOSTILE, "key": "k"}]
    ]
    assert [file for file, content in contents.items() if b"alice" in content] == [FILES.keys]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_without_json_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="cannot be represented in JSON"):
        quoted(value)


def test_a_template_prints_only_what_it_is_given() -> None:
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, finalize=quoted, autoescape=True)
    with pytest.raises(jinja2.UndefinedError):
        environment.from_string("{{ nothing }}").render()


def test_pages_of_allowed_origins_may_name_their_session() -> None:
    (allowed,) = found(rendered(cors_origins="https://chat.example"), "allow_headers")
    assert SESSION_HEADER in allowed.split(", ")


def test_filters_stand_in_the_order_that_protects() -> None:
    every = rendered((ApiKey("a", "k"),), requests_per_second_per_client=1, cors_origins="*")
    assert filters(every) == [
        "header_mutation",
        "requests",
        "cors",
        "health_check",
        "api_key_auth",
        "local_ratelimit",
        "lua",
        "buffer",
        "grpc_json_transcoder",
        "router",
    ]
    plain = rendered()
    assert not {"cors", "api_key_auth", "local_ratelimit"} & set(filters(plain))
    assert {"remove": "authorization"} in found(plain, "request_mutations")[0]
    assert {"remove": "authorization"} not in found(every, "request_mutations")[0]


@pytest.mark.parametrize(
    ("settings", "keys", "rate"),
    [
        ({}, (), None),
        ({"host": "0.0.0.0"}, (), 500),
        ({}, (ApiKey("a", "k"),), 500),
        ({"requests_per_second_per_client": 7}, (), 7),
    ],
)
def test_clients_with_keys_or_from_elsewhere_are_limited(
    settings: dict[str, Any], keys: tuple[ApiKey, ...], rate: int | None
) -> None:
    config = rendered(keys, **settings, **({"api_keys": Path("keys")} if keys else {}))
    rates = [
        bucket["tokens_per_fill"] for part in found(config, "descriptors") for bucket in found(part, "token_bucket")
    ]
    assert rates == ([] if rate is None else [rate])


def test_the_admin_interface_is_a_private_socket() -> None:
    assert rendered()["admin"] == {"address": {"pipe": {"path": "/run/edge/admin.sock", "mode": 0o600}}}


def test_names_and_addresses_of_frontends() -> None:
    tree = rendered(frontends="10.0.0.1:1,[::1]:2,frontend.example:3", upstream_tls_ca="/ca")
    addresses = [entry["endpoint"]["address"]["socket_address"] for entry in found(tree, "lb_endpoints")[0]]
    assert [(a["address"], a["port_value"]) for a in addresses] == [
        ("10.0.0.1", 1),
        ("::1", 2),
        ("frontend.example", 3),
    ]
    config = EdgeConfig(frontends="10.0.0.1:1,[::1]:2,frontend.example:3", upstream_tls_ca="/ca")
    (ca,) = loaded(render(config, (), FILES)[FILES.secret("frontends_ca")])["resources"]
    assert ca["validation_context"]["match_typed_subject_alt_names"] == [
        {"san_type": "IP_ADDRESS", "matcher": {"exact": "10.0.0.1"}},
        {"san_type": "IP_ADDRESS", "matcher": {"exact": "::1"}},
        {"san_type": "DNS", "matcher": {"exact": "frontend.example"}},
    ]


def frontends_cluster(**settings: Any) -> dict[str, Any]:
    cluster: dict[str, Any]
    (cluster,) = loaded(render(EdgeConfig(**settings), (), FILES)[FILES.config])["static_resources"]["clusters"]
    return cluster


@pytest.mark.parametrize("source", [{"frontends": "127.0.0.1:1"}, {"registry": "127.0.0.1:7400"}])
def test_health_check_results_count_at_once(source: dict[str, str]) -> None:
    assert frontends_cluster(**source)["common_lb_config"]["update_merge_window"] == "0s"


def test_names_are_looked_up_where_the_settings_say() -> None:
    def dns(**settings: Any) -> Any:
        return frontends_cluster(frontends="frontend.example:3", **settings)["cluster_type"]["typed_config"]

    assert dns()["dns_refresh_rate"] == "1.000s"
    assert "typed_dns_resolver_config" not in dns()
    resolver = dns(dns_server="[::1]:8600", dns_refresh_s=0.5)["typed_dns_resolver_config"]["typed_config"]
    assert resolver["resolvers"] == [{"socket_address": {"address": "::1", "port_value": 8600}}]
    assert resolver["dns_resolver_options"]["use_tcp_for_dns_lookups"] is True


def test_frontends_of_a_registry_are_in_a_file_that_envoy_watches() -> None:
    config = EdgeConfig(registry="127.0.0.1:7400", upstream_tls_ca="/ca")
    files = render(config, (), FILES, (Endpoint("10.0.0.1", 1), Endpoint("::1", 2, is_draining=True)))
    cluster = frontends_cluster(registry="127.0.0.1:7400")
    assert cluster["type"] == "EDS"
    assert "load_assignment" not in cluster
    source = cluster["eds_cluster_config"]["eds_config"]["path_config_source"]
    assert source == {"path": str(FILES.endpoints)}
    (assignment,) = json.loads(files[FILES.endpoints])["resources"]
    assert assignment["cluster_name"] == cluster["name"]
    assert [entry.get("health_status") for entry in found(assignment, "lb_endpoints")[0]] == [None, "DRAINING"]
    (ca,) = loaded(files[FILES.secret("frontends_ca")])["resources"]
    names = ca["validation_context"]["match_typed_subject_alt_names"]
    assert names == [{"san_type": "DNS", "matcher": {"exact": "frontend"}}]


def test_no_endpoint_is_marked_where_all_drain() -> None:
    resource = json.loads(
        assignment((Endpoint("10.0.0.1", 1, is_draining=True), Endpoint("10.0.0.2", 1, is_draining=True)))
    )
    assert not found(resource, "health_status")
    assert found(json.loads(assignment(())), "lb_endpoints") == [[]]


def test_every_grpc_code_but_ok_has_one_http_status() -> None:
    assert set(ERROR_BY_CODE) == {*code_pb2.Code.keys()} - {"OK"}
    assert len(ERROR_BY_CODE) == sum(len(row.codes) for row in ROWS)


def exact_replies(mappers: list[dict[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Status and body of each reply to one status; those to Anthropic's paths are filtered by the path too."""
    for mapper in mappers:
        filters = mapper["filter"].get("and_filter", {}).get("filters", [mapper["filter"]])
        comparison = filters[0]["status_code_filter"]["comparison"]
        if comparison["op"] == "EQ":
            yield comparison["value"]["default_value"], mapper["body_format_override"]["json_format"]


def test_replies_of_the_edge_and_its_lua_filter_use_the_table_of_http_errors() -> None:
    config = EdgeConfig(frontends="127.0.0.1:1")
    files = render(config, (), FILES)
    mappers = found(loaded(files[FILES.config]), "mappers")[0]
    exact = {status: form for status, form in exact_replies(mappers) if "type" not in form}
    assert {401, 413, 429, 503, 504} <= set(exact)
    for status, form in exact.items():
        assert (form["error"]["type"], form["error"]["code"]) == (ERRORS[status].type, ERRORS[status].edge_code)
    anthropic = [(status, form) for status, form in exact_replies(mappers) if "type" in form]
    assert {status for status, _ in anthropic} == {*exact, 404}
    for status, form in anthropic:
        assert (form["type"], form["error"]["type"]) == ("error", ERRORS[status].messages_type)
    lua = files[FILES.lua].decode()
    for name, types in (
        ("TYPES", {row.status: row.type for row in ROWS}),
        ("ANTHROPIC_TYPES", {row.status: row.messages_type for row in ROWS}),
    ):
        table = lua.partition(f"\nlocal {name} = {{\n")[2].partition("\n}\n")[0]
        assert {int(status): kind for status, kind in re.findall(r'\[(\d+)\] = "(\w+)",', table)} == types
    assert '["9"] = 503,' in lua, "a failed precondition is about workers that do not fit together"


def test_descriptors_are_whole() -> None:
    files = descriptor_pb2.FileDescriptorSet.FromString(transcoding.descriptor_set()).file
    pool = descriptor_pool.DescriptorPool()
    for file in files:
        pool.Add(file)  # raises when an import is missing
        pool.FindFileByName(file.name)
    for name in (*transcoding.SERVICE_NAMES, "google.rpc.ErrorInfo", "google.rpc.RetryInfo"):
        try:
            pool.FindMessageTypeByName(name)
        except KeyError:
            pool.FindServiceByName(name)
    names = [file.name for file in files]
    for file in files:
        assert all(names.index(needed) < names.index(file.name) for needed in file.dependency)


def test_routes_are_those_of_the_contracts() -> None:
    routes = {(route.path, route.is_prefix): route.methods for route in transcoding.http_routes()}
    assert routes[("/v1/generate", False)] == ("POST",)
    assert routes[("/v1/models/", True)] == ("GET",)
    assert ("/v1/chat/completions", False) in routes
    assert [route.is_prefix for route in transcoding.http_routes()] == sorted(r[1] for r in routes)


def test_the_parts_are_found_where_the_package_is() -> None:
    assert {TEMPLATE, SECRET_TEMPLATE, ERRORS_TEMPLATE} <= {part.name for part in PARTS.iterdir()}


def test_a_response_that_failed_for_its_own_content_is_not_repeated_on_another_frontend() -> None:
    policies = found(rendered(), "retry_on")
    assert policies
    for policy in policies:
        assert ParserFailed.code.lower() not in policy.split(",")
        assert EngineFailed.code.lower() not in policy.split(",")
        assert "unavailable" in policy.split(",")
    assert ERROR_BY_CODE[ParserFailed.code].status == 500
