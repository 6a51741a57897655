"""Generates the Prometheus Operator's copy of the alerts, or checks that it is up to date.

    python tools/gen_prometheus_rule.py            write
    python tools/gen_prometheus_rule.py --check    exit 1 when the file differs

A manifest cannot include a file, and the alerts are tested where they are. Standard library only.
"""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[1]
ALERTS = ROOT / "deploy" / "observability" / "prometheus" / "alerts.yml"
RULE = ROOT / "deploy" / "kubernetes" / "monitoring" / "alerts.yaml"
HEAD = """\
# Written by tools/gen_prometheus_rule.py from deploy/observability/prometheus/alerts.yml: edit that file.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata: {name: tandem}
spec:
"""


def manifest() -> str:
    """The alerts as a PrometheusRule."""
    text = ALERTS.read_text()
    return HEAD + textwrap.indent(text[text.index("groups:\n") :], "  ")


def main() -> int:
    wanted = manifest()
    if "--check" not in sys.argv[1:]:
        RULE.write_text(wanted)
        return 0
    if RULE.is_file() and RULE.read_text() == wanted:
        return 0
    print(f"{RULE.relative_to(ROOT)} differs from {ALERTS.relative_to(ROOT)}: run tools/gen_prometheus_rule.py")
    return 1


if __name__ == "__main__":
    sys.exit(main())
