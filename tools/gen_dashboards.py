"""Writes deploy/observability/grafana/dashboards/*.json, so that panels are lines here and not pages of JSON.

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
        "Requests that ended, by how: without an error, or by its reason. CANCELLED: the client left.",
        "reqps",
        {"{{error_type}}": rate(f"{REQUEST}_count", "error_type")},
        stacked=True,
    ),
    Panel(
        "Time to first token", "From a request's coming, the line before the workers included.", "s", quantiles(FIRST)
    ),
    Panel(
        "Time per output token", "Between tokens after the first, as an average of each request.", "s", quantiles(EACH)
    ),
    Panel(
        "Tokens",
        "Of requests that finished.",
        "short",
        {"{{gen_ai_token_type}} tokens a second": rate(f"{USAGE}_sum", "gen_ai_token_type")},
    ),
    Panel(
        "Open and in line",
        "Requests that have not ended, and those of them that wait for room with the workers.",
        "short",
        {"open": "sum(tandem_requests_open)", "in line": "sum(tandem_queue_depth)"},
    ),
    Panel("Wait in line", "Of requests that got a place.", "s", quantiles("tandem_queue_wait_seconds")),
    Panel(
        "Admitted and refused",
        "A refused request reached no worker; the reason says whose fault it is.",
        "reqps",
        {
            "admitted": rate("tandem_requests_admitted_total"),
            "refused: {{tandem_reason}}": f"{rate('tandem_requests_refused_total', 'tandem_reason')} > 0",
        },
    ),
    Panel(
        "Attempts and continuations",
        "How pairs are chosen, and streams that went on with other workers.",
        "ops",
        {
            "{{tandem_policy}} {{tandem_route}}": rate("tandem_pairs_chosen_total", "tandem_policy", "tandem_route"),
            "continuation: {{tandem_outcome}}": rate("tandem_continuations_total", "tandem_outcome"),
        },
    ),
    Panel(
        "Leg failures",
        "Legs that broke an attempt. Another attempt or a continuation may have saved the request.",
        "ops",
        {
            "{{tandem_leg}} {{tandem_phase}} {{tandem_reason}}": rate(
                "tandem_leg_failures_total", "tandem_leg", "tandem_phase", "tandem_reason"
            )
        },
    ),
    Panel(
        "Cancel latency",
        "From a client's leaving to the end of both legs, and from there to the moment an engine has let go.",
        "s",
        {
            "frontend p99": quantile(0.99, "tandem_cancel_latency_seconds"),
            "{{tandem_leg}} engine p99": quantile(0.99, "tandem_leg_abort_duration_seconds", "tandem_leg"),
        },
        width=12,
    ),
    Panel(
        "Requests of each frontend",
        "Uneven shares mean that something before them does not spread.",
        "reqps",
        {"{{process}}": rate(f"{REQUEST}_count", "process")},
        width=12,
    ),
    Panel(
        "Connections",
        "Of clients, edges and probes; of a frontend with several processes, of each. One without any is idle.",
        "short",
        {"{{process}} {{tandem_process}}": "sum by (process, tandem_process) (tandem_connections_open)"},
        width=12,
    ),
    Panel(
        "Open requests of each process",
        "Of a frontend with several processes, of each.",
        "short",
        {"{{process}} {{tandem_process}}": "sum by (process, tandem_process) (tandem_requests_open)"},
        width=12,
    ),
)

KV = "tandem_kv_transfer"
WORKERS = (
    Panel(
        "KV in use",
        "Pages that requests hold. Near 100 % requests wait for memory.",
        "percentunit",
        {"{{process}}": 'sum without (tandem_state) (tandem_kv_pages{tandem_state="used"}) / tandem_kv_pages_capacity'},
    ),
    Panel(
        "KV pages free",
        "Pages that can be had at once.",
        "short",
        {"{{process}}": 'tandem_kv_pages{tandem_state="free"}'},
    ),
    Panel(
        "Cache hit ratio",
        "Prompt tokens found in the prefix cache, of the last 256 legs.",
        "percentunit",
        {"{{process}}": "tandem_cache_hit_ratio"},
    ),
    Panel(
        "KV transfer",
        "Bytes that the transport has moved.",
        "Bps",
        {"{{process}}": rate(f"{KV}_bytes_total", "process")},
    ),
    Panel(
        "Transfer time",
        "From the first byte of a request's KV to the last.",
        "s",
        {
            "{{tandem_leg}} p50": quantile(0.5, f"{KV}_duration_seconds", "tandem_leg"),
            "{{tandem_leg}} p99": quantile(0.99, f"{KV}_duration_seconds", "tandem_leg"),
        },
    ),
    Panel(
        "Transfer bandwidth",
        "Of each request: what one transfer gets, not the sum.",
        "Bps",
        {"{{tandem_leg}} p50": quantile(0.5, f"{KV}_bandwidth_bytes_per_second", "tandem_leg")},
    ),
    Panel(
        "Engine queue wait",
        "From the engine's taking of a request to its prefill.",
        "s",
        {
            "p50": quantile(0.5, "tandem_engine_queue_wait_seconds"),
            "p99": quantile(0.99, "tandem_engine_queue_wait_seconds"),
        },
    ),
    Panel(
        "Prefill",
        "The prompt's way through the model.",
        "s",
        {
            "p50": quantile(0.5, "tandem_prefill_duration_seconds"),
            "p99": quantile(0.99, "tandem_prefill_duration_seconds"),
        },
    ),
    Panel(
        "Requests in the engines",
        "What they do.",
        "short",
        {"{{process}} {{tandem_state}}": "tandem_engine_requests"},
    ),
    Panel(
        "Legs",
        "Legs that ended, by how.",
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
        "1: it proves itself by tokens or a canary.",
        "short",
        {"{{process}}": "tandem_engine_healthy"},
        width=24,
    ),
)

CLUSTER = (
    Panel(
        "Members",
        "As the registries see them.",
        "short",
        {"{{tandem_role}} {{tandem_state}}": "max by (tandem_role, tandem_state) (tandem_members) > 0"},
    ),
    Panel(
        "Lease age",
        "Time since each worker's last sign of life, and the age at which it is out.",
        "s",
        {
            "{{tandem_worker_id}}": "max by (tandem_worker_id) (tandem_lease_age_seconds)",
            "out": "max(tandem_lease_ttl_seconds)",
        },
    ),
    Panel(
        "Views",
        "Who follows each registry, and whether its view is live (1) or the last known one (0).",
        "short",
        {"{{process}} watchers": "tandem_watchers", "{{process}} live": "tandem_view_live"},
    ),
    Panel("Processes", "1: it can be scraped.", "short", {"{{process}} {{job}}": 'up{job=~"tandem.*"}'}),
    Panel(
        "Event loop lag",
        "How late timers are: whatever holds up the loop holds up every stream of the process.",
        "s",
        {
            "{{process}} {{tandem_process}} p99": quantile(
                0.99, "tandem_event_loop_lag_seconds", "process", "tandem_process"
            )
        },
    ),
    Panel(
        "Drains",
        "Begun by processes that are still there.",
        "short",
        {"{{process}}": "sum by (process) (tandem_drains_total)"},
    ),
    Panel(
        "CPU",
        "Cores of each process; engines' children are not in it.",
        "short",
        {"{{process}}": 'sum by (process) (rate(process_cpu_seconds_total{job="tandem"}[$__rate_interval]))'},
    ),
    Panel(
        "Memory",
        "Resident; of a frontend with several processes, of all together.",
        "bytes",
        {"{{process}}": 'sum by (process) (process_resident_memory_bytes{job="tandem"})'},
    ),
    Panel(
        "Processes of frontends",
        "Of frontends that have several: how many serve, and how often one was started again.",
        "short",
        {
            "{{process}} {{tandem_state}}": "sum by (process, tandem_state) (tandem_processes) > 0",
            "{{process}} started again": "sum by (process) (increase(tandem_process_restarts_total[$__rate_interval]))",
        },
    ),
    Panel(
        "HTTP at the edge",
        "Responses of Envoy by class of status.",
        "reqps",
        {
            "{{envoy_response_code_class}}xx": rate(
                'envoy_http_downstream_rq_xx{envoy_http_conn_manager_prefix="edge"}', "envoy_response_code_class"
            )
        },
    ),
)

DASHBOARDS = {
    "tandem-requests": ("Tandem: requests", "What clients get, and what it costs.", REQUESTS),
    "tandem-workers": ("Tandem: workers and KV", "Engines, their memory, and the way of the KV between them.", WORKERS),
    "tandem-cluster": ("Tandem: cluster", "Members, registries, processes, the edge.", CLUSTER),
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
    custom = {"fillOpacity": 20 if panel.stacked else 5, "showPoints": "never"}
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
