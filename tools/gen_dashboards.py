"""Generates deploy/observability/grafana/dashboards/*.json from a short list of panels.

--check writes nothing and fails when a file differs. Every query is run against a real Prometheus in
tests/integration/test_prometheus.py. Standard library only.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DIRECTORY = Path(__file__).parents[1] / "deploy" / "observability" / "grafana" / "dashboards"
SOURCE = {"type": "prometheus", "uid": "${source}"}
COLUMNS = 24
HEIGHT = 8
REQUEST = "gen_ai_server_request_duration_seconds"
FIRST = "gen_ai_server_time_to_first_token_seconds"
EACH = "gen_ai_server_time_per_output_token_seconds"
USAGE = "gen_ai_client_token_usage"


@dataclass(frozen=True)
class Panel:
    title: str
    about: str
    unit: str
    queries: dict[str, str]
    """PromQL by legend."""
    width: int = 8
    stacked: bool = False


def rate(series: str, *by: str) -> str:
    summed = f"sum by ({', '.join(by)})" if by else "sum"
    return f"{summed} (rate({series}[$__rate_interval]))"


def quantile(q: float, name: str, *by: str) -> str:
    return f"histogram_quantile({q}, {rate(f'{name}_bucket', 'le', *by)})"


def quantiles(name: str) -> dict[str, str]:
    return {f"p{int(q * 100)}": quantile(q, name) for q in (0.5, 0.9, 0.99)}


REQUESTS = (
    Panel(
        "Requests",
        "Ended requests by error reason; empty: no error. CANCELLED: the client cancelled.",
        "reqps",
        {"{{error_type}}": rate(f"{REQUEST}_count", "error_type")},
        stacked=True,
    ),
    Panel("Time to first token", "From the arrival of a request; includes queue wait.", "s", quantiles(FIRST)),
    Panel("Time per output token", "Average per request, over the tokens after the first.", "s", quantiles(EACH)),
    Panel(
        "Tokens",
        "Of finished requests.",
        "short",
        {"{{gen_ai_token_type}} tokens a second": rate(f"{USAGE}_sum", "gen_ai_token_type")},
    ),
    Panel(
        "Open and queued",
        "Requests in progress, and those of them that wait for worker capacity.",
        "short",
        {"open": "sum(tandem_requests_open)", "queued": "sum(tandem_queue_depth)"},
    ),
    Panel("Queue wait", "Of admitted requests.", "s", quantiles("tandem_queue_wait_seconds")),
    Panel(
        "Admitted and rejected",
        "A rejected request reached no worker; the reason separates client errors from cluster errors.",
        "reqps",
        {
            "admitted": rate("tandem_requests_admitted_total"),
            "rejected: {{tandem_reason}}": f"{rate('tandem_requests_refused_total', 'tandem_reason')} > 0",
        },
    ),
    Panel(
        "Attempts and continuations",
        "Attempts by policy and route, and streams continued on other workers.",
        "ops",
        {
            "{{tandem_policy}} {{tandem_route}}": rate("tandem_pairs_chosen_total", "tandem_policy", "tandem_route"),
            "continuation: {{tandem_outcome}}": rate("tandem_continuations_total", "tandem_outcome"),
        },
    ),
    Panel(
        "Prefix caches of the picked workers",
        "Prompt tokens that the routing policy expected there, and tokens that were.",
        "short",
        {
            "expected: {{tandem_policy}}": rate("tandem_route_expected_cached_tokens_total", "tandem_policy"),
            "found: {{tandem_policy}}": rate("tandem_route_cached_tokens_total", "tandem_policy"),
        },
    ),
    Panel(
        "Prefix caches followed",
        "Workers whose cache each frontend knows; suspected: without credit until their next snapshot.",
        "short",
        {"{{process}} {{tandem_state}}": "sum by (process, tandem_state) (tandem_prefix_workers)"},
    ),
    Panel(
        "Leg failures",
        "Legs whose failure ended an attempt. A retry or continuation may have recovered the request.",
        "ops",
        {
            "{{tandem_leg}} {{tandem_phase}} {{tandem_reason}}": rate(
                "tandem_leg_failures_total", "tandem_leg", "tandem_phase", "tandem_reason"
            )
        },
    ),
    Panel(
        "Cancel latency",
        "Frontend: from a client's cancellation to the end of both legs. Engine: until it has released the leg.",
        "s",
        {
            "frontend p99": quantile(0.99, "tandem_cancel_latency_seconds"),
            "{{tandem_leg}} engine p99": quantile(0.99, "tandem_leg_abort_duration_seconds", "tandem_leg"),
        },
    ),
    Panel(
        "Requests of each frontend",
        "Uneven rates: the load balancer in front does not spread requests evenly.",
        "reqps",
        {"{{process}}": rate(f"{REQUEST}_count", "process")},
        width=12,
    ),
    Panel(
        "Connections",
        "From clients, edges and health checks, per process. A process without connections is idle.",
        "short",
        {"{{process}} {{tandem_process}}": "sum by (process, tandem_process) (tandem_connections_open)"},
        width=12,
    ),
    Panel(
        "Open requests of each process",
        "Per process of a frontend.",
        "short",
        {"{{process}} {{tandem_process}}": "sum by (process, tandem_process) (tandem_requests_open)"},
        width=12,
    ),
    Panel(
        "Tokens of tenants",
        "Prompt and completion tokens of calls that have ended. `other`: tenants beyond the first 32 of a process.",
        "short",
        {
            "{{tandem_tenant}}": (
                'sum by (tandem_tenant) (rate(tandem_tenant_tokens_total{tandem_tokens!="cached"}[$__rate_interval]))'
            )
        },
        width=12,
    ),
    Panel(
        "Refused by quotas",
        "Calls beyond their tenant's quota, by the limit that was reached.",
        "reqps",
        {"{{tandem_tenant}} {{tandem_quota}}": rate("tandem_tenant_refused_total", "tandem_tenant", "tandem_quota")},
        width=12,
    ),
)

KV = "tandem_kv_transfer"
WORKERS = (
    Panel(
        "KV in use",
        "KV pages held by requests. Near 100 % requests wait for memory.",
        "percentunit",
        {"{{process}}": 'sum without (tandem_state) (tandem_kv_pages{tandem_state="used"}) / tandem_kv_pages_capacity'},
    ),
    Panel(
        "KV pages free",
        "Pages available without eviction.",
        "short",
        {"{{process}}": 'tandem_kv_pages{tandem_state="free"}'},
    ),
    Panel(
        "Cache hit ratio",
        "Fraction of prompt tokens found in the prefix cache, over the last 256 legs.",
        "percentunit",
        {"{{process}}": "tandem_cache_hit_ratio"},
    ),
    Panel(
        "KV transfer",
        "Bytes per second, as counted by the transfer backend.",
        "Bps",
        {"{{process}}": rate(f"{KV}_bytes_total", "process")},
    ),
    Panel(
        "KV transfer time",
        "From the first to the last byte of a request's KV.",
        "s",
        {
            "{{tandem_leg}} p50": quantile(0.5, f"{KV}_duration_seconds", "tandem_leg"),
            "{{tandem_leg}} p99": quantile(0.99, f"{KV}_duration_seconds", "tandem_leg"),
        },
    ),
    Panel(
        "KV transfer bandwidth",
        "Of a single transfer, not the sum.",
        "Bps",
        {"{{tandem_leg}} p50": quantile(0.5, f"{KV}_bandwidth_bytes_per_second", "tandem_leg")},
    ),
    Panel(
        "Hand-overs by check",
        "Corrupt: the KV that arrived is not what was sent, and was refused.",
        "ops",
        {"{{tandem_kv_check}}": rate("tandem_kv_handovers_total", "tandem_kv_check")},
    ),
    Panel(
        "Engine queue wait",
        "From the engine's acceptance of a request to its prefill.",
        "s",
        {
            "p50": quantile(0.5, "tandem_engine_queue_wait_seconds"),
            "p99": quantile(0.99, "tandem_engine_queue_wait_seconds"),
        },
    ),
    Panel(
        "Prefill",
        "Duration of the prefill forward passes.",
        "s",
        {
            "p50": quantile(0.5, "tandem_prefill_duration_seconds"),
            "p99": quantile(0.99, "tandem_prefill_duration_seconds"),
        },
    ),
    Panel(
        "Requests in the engines",
        "By state.",
        "short",
        {"{{process}} {{tandem_state}}": "tandem_engine_requests"},
    ),
    Panel(
        "Tokens that wait",
        "In each engine's own queue; on prefill: of prompts.",
        "short",
        {"{{process}}": "tandem_engine_waiting_tokens"},
    ),
    Panel(
        "Legs",
        "Ended legs by outcome.",
        "ops",
        {
            "{{tandem_leg}} {{tandem_outcome}}": rate(
                "tandem_leg_duration_seconds_count", "tandem_leg", "tandem_outcome"
            )
        },
    ),
    Panel("Open legs", "By worker.", "short", {"{{process}}": "tandem_legs_open"}),
    Panel(
        "Prompt tokens",
        "Computed and cached.",
        "short",
        {
            "{{process}}": rate("tandem_prompt_tokens_total", "process"),
            "{{process}} cached": rate("tandem_prompt_cached_tokens_total", "process"),
        },
    ),
    Panel(
        "Healthy engines",
        "1: the engine emits tokens or answers its canary; 0: the worker is NOT_SERVING.",
        "short",
        {"{{process}}": "tandem_engine_healthy"},
        width=16,
    ),
)

CLUSTER = (
    Panel(
        "Members",
        "As listed by the registries.",
        "short",
        {"{{tandem_role}} {{tandem_state}}": "max by (tandem_role, tandem_state) (tandem_members) > 0"},
    ),
    Panel(
        "Lease age",
        "Time since each worker's last keepalive, and the age at which its lease expires.",
        "s",
        {
            "{{tandem_worker_id}}": "max by (tandem_worker_id) (tandem_lease_age_seconds)",
            "expiry": "max(tandem_lease_ttl_seconds)",
        },
    ),
    Panel(
        "Views",
        "Watchers of each registry, and whether its view is live (1) or last known (0).",
        "short",
        {"{{process}} watchers": "tandem_watchers", "{{process}} live": "tandem_view_live"},
    ),
    Panel("Processes", "1: scraped successfully.", "short", {"{{process}} {{job}}": 'up{job=~"tandem.*"}'}),
    Panel(
        "Event loop lag",
        "Delay of event loop timers; it delays every stream of the process.",
        "s",
        {
            "{{process}} {{tandem_process}} p99": quantile(
                0.99, "tandem_event_loop_lag_seconds", "process", "tandem_process"
            )
        },
    ),
    Panel(
        "Drains",
        "Started by processes that still run.",
        "short",
        {"{{process}}": "sum by (process) (tandem_drains_total)"},
    ),
    Panel(
        "CPU",
        "Cores used per process, without the child processes of engines.",
        "short",
        {"{{process}}": 'sum by (process) (rate(process_cpu_seconds_total{job="tandem"}[$__rate_interval]))'},
    ),
    Panel(
        "Memory",
        "Resident memory; of all processes of a frontend together.",
        "bytes",
        {"{{process}}": 'sum by (process) (process_resident_memory_bytes{job="tandem"})'},
    ),
    Panel(
        "Processes of frontends",
        "Frontends with several processes: processes by state, and restarts.",
        "short",
        {
            "{{process}} {{tandem_state}}": "sum by (process, tandem_state) (tandem_processes) > 0",
            "{{process}} restarts": "sum by (process) (increase(tandem_process_restarts_total[$__rate_interval]))",
        },
    ),
    Panel(
        "HTTP at the edge",
        "Responses of Envoy by status class.",
        "reqps",
        {
            "{{envoy_response_code_class}}xx": rate(
                'envoy_http_downstream_rq_xx{envoy_http_conn_manager_prefix="edge"}', "envoy_response_code_class"
            )
        },
    ),
)

DASHBOARDS = {
    "tandem-requests": ("Tandem: requests", "Latency, throughput, queue and errors as seen by clients.", REQUESTS),
    "tandem-workers": ("Tandem: workers and KV", "Engines, KV memory and KV transfer.", WORKERS),
    "tandem-cluster": ("Tandem: cluster", "Members, registries, processes and the edge.", CLUSTER),
}


def dashboard(uid: str, title: str, about: str, panels: tuple[Panel, ...]) -> dict[str, Any]:
    return {
        "uid": uid,
        "title": title,
        "description": about,
        "tags": ["tandem"],
        "schemaVersion": 41,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "5s",
        "time": {"from": "now-15m", "to": "now"},
        "templating": {
            "list": [{"name": "source", "label": "Prometheus", "type": "datasource", "query": "prometheus", "hide": 0}]
        },
        "panels": list(_placed(panels)),
    }


def _placed(panels: tuple[Panel, ...]) -> Any:
    x = y = 0
    for number, panel in enumerate(panels, 1):
        if x + panel.width > COLUMNS:
            x, y = 0, y + HEIGHT
        yield _panel(number, panel, {"x": x, "y": y, "w": panel.width, "h": HEIGHT})
        x += panel.width


def _panel(number: int, panel: Panel, place: dict[str, int]) -> dict[str, Any]:
    custom: dict[str, Any] = {"fillOpacity": 20 if panel.stacked else 5, "showPoints": "never"}
    if panel.stacked:
        custom["stacking"] = {"mode": "normal"}
    return {
        "id": number,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.about,
        "datasource": SOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0, "custom": custom}, "overrides": []},
        "options": {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
        "targets": [
            {
                "refId": chr(ord("A") + place_of),
                "datasource": SOURCE,
                "expr": expr,
                "legendFormat": legend,
                "range": True,
            }
            for place_of, (legend, expr) in enumerate(panel.queries.items())
        ],
    }


def main() -> int:
    stale = []
    for uid, (title, about, panels) in DASHBOARDS.items():
        file = DIRECTORY / f"{uid}.json"
        text = json.dumps(dashboard(uid, title, about, panels), indent=2) + "\n"
        if "--check" in sys.argv[1:]:
            stale += [] if file.is_file() and file.read_text() == text else [file.name]
        else:
            file.write_text(text)
    if stale:
        print(f"{', '.join(stale)}: differ from tools/gen_dashboards.py; run it", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
