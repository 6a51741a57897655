"""Generates the templates of the Helm chart from the manifests for Kubernetes, or checks that they are up to date.

    python tools/gen_helm_chart.py            write
    python tools/gen_helm_chart.py --check    exit 1 when a file differs

One set of manifests is kept, deploy/kubernetes/base: with the chart's default values Helm makes what kustomize makes
of it, and with `engine: gpu` what it makes of deploy/kubernetes/gpu (`make deploy-lint` compares them). Each rule below
must apply somewhere, so that a change of the manifests cannot silently leave a value without effect.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

import tandem

ROOT = Path(__file__).parents[1]
BASE = ROOT / "deploy" / "kubernetes" / "base"
CHART = ROOT / "deploy" / "helm" / "tandem"
WORKERS = ("prefill", "decode")
SERVICES = (*WORKERS, "registry", "frontend", "edge")
PART_OF = "app.kubernetes.io/part-of: tandem"
HEAD = "{{- /* Written by tools/gen_helm_chart.py from deploy/kubernetes/base: edit that. */ -}}\n"
CHART_FILE = f"""\
# Written by tools/gen_helm_chart.py.
apiVersion: v2
name: tandem
description: Large language models served with prefill and decode disaggregated on SGLang
type: application
version: {tandem.__version__}
appVersion: {tandem.__version__}
kubeVersion: ">=1.27.0-0"
"""
TAG = "{{ .Values.image.tag | default .Chart.AppVersion }}"
CONSOLE_PORT, CONSOLE_KEYS = 8090, "/run/tandem/console"
GPU = '{{- if eq .Values.engine "gpu" }}'
EVERYWHERE = (
    (r"^metadata: \{name: ([\w-]+)\}$", rf"metadata: {{name: \1, labels: {{{PART_OF}}}}}"),
    (r"metadata: \{labels: \{(app: [\w-]+)\}\}", rf"metadata: {{labels: {{\1, {PART_OF}}}}}"),
    (r"value: /models/tandem-demo\}", 'value: {{ printf "/models/%s" .Values.model | quote }}}'),
    (r"claimName: models,", "claimName: {{ .Values.models.claim }},"),
    (r"secretName: tandem-api-keys", "secretName: {{ .Values.apiKeysSecret }}"),
    (r"kubernetes\.io/metadata\.name: monitoring", "kubernetes.io/metadata.name: {{ .Values.metricsNamespace }}"),
    (r"storage: 10Gi", "storage: {{ .Values.models.storage }}"),
)
"""Patterns, and what replaces them in every file."""


def service_rules(service: str) -> list[tuple[str, str]]:
    """The rules for the file of one service."""
    is_worker = service in WORKERS
    resources = "index .Values.workerResources .Values.engine" if is_worker else f".Values.{service}.resources"
    suffix = "-{{ .Values.engine }}" if is_worker else ""
    settings = (
        f"            {{{{- range $key, $value := .Values.{service}.settings }}}}\n"
        f"            - {{name: TANDEM_{service.upper()}_{{{{ upper $key }}}}, value: {{{{ quote $value }}}}}}\n"
        "            {{- end }}\n"
    )
    before_context = r"(?m)^(?=          securityContext: \{allowPrivilegeEscalation)"
    rules = [
        (r"image: tandem/[\w-]+:\S+", f'image: "{{{{ .Values.image.prefix }}}}{service}:{TAG}{suffix}"'),
        (r"  resources: \{requests: .*", f"  resources: {{{{ toJson ({resources}) }}}}"),
        (before_context, settings),
    ]
    # Consul's settings come with more than a count.
    if service != "registry":
        rules.append((r"replicas: \d+", f"replicas: {{{{ .Values.{service}.replicas }}}}"))
    if service == "frontend":
        rules += console_rules(before_context)
    if is_worker:
        ucx = f"            {GPU}\n            - {{name: UCX_TLS, value: all}}\n            {{{{- end }}}}\n"
        mount = "            - {name: cache, mountPath: /var/cache/tandem}\n"
        cache = "        - {name: cache, emptyDir: {}}\n"
        end = "{{- end }}\n"
        rules += [
            (before_context, ucx),
            (r"capabilities: \{drop: \[ALL\]\}", f"capabilities: {{drop: [ALL]{GPU}, add: [IPC_LOCK]{{{{- end }}}}}}"),
            (r"(?m)^(?=      volumes:$)", f"            {GPU}\n{mount}            {end}"),
            (r"(?m)^(        - \{name: models, persistentVolumeClaim.*\n)", rf"\1        {GPU}\n{cache}        {end}"),
        ]
    return rules


def console_rules(before_context: str) -> list[tuple[str, str]]:
    """The rules for a console on each frontend: its port, its keys from a Secret, and nothing without that."""
    begin, end = "{{- with .Values.frontend.consoleKeysSecret }}\n", "{{- end }}\n"

    def block(indent: str, *lines: str) -> str:
        return indent + begin + "".join(f"{indent}{line}\n" for line in lines) + indent + end

    wide, narrow = " " * 12, " " * 8
    settings = block(
        wide,
        f'- {{name: TANDEM_FRONTEND_CONSOLE_PORT, value: "{CONSOLE_PORT}"}}',
        f"- {{name: TANDEM_FRONTEND_CONSOLE_KEYS, value: {CONSOLE_KEYS}/console.keys}}",
    )
    port = block(wide, f"- {{name: console, containerPort: {CONSOLE_PORT}}}")
    mount = block(wide, f"- {{name: console-keys, mountPath: {CONSOLE_KEYS}, readOnly: true}}")
    volume = block(narrow, "- {name: console-keys, secret: {secretName: {{ . }}, defaultMode: 0444}}")
    return [
        (r"(?m)^(            - \{name: metrics, containerPort: \d+\}\n)", rf"\1{port}"),
        (before_context, settings),
        (r"(?m)^(?=      volumes:$)", mount),
        (r"(?m)^(        - \{name: models, persistentVolumeClaim.*\n)", rf"\1{volume}"),
    ]


def templates() -> dict[Path, str]:
    """Each file of the chart that is generated, with its text.

    Raises:
        ValueError: a rule applies nowhere.
    """
    made = {CHART / "Chart.yaml": CHART_FILE}
    left = {pattern for pattern, _ in EVERYWHERE}
    for file in sorted(BASE.glob("*.yaml")):
        if file.stem == "kustomization":
            continue
        text = file.read_text()
        for pattern, replacement in service_rules(file.stem) if file.stem in SERVICES else ():
            text, count = re.subn(pattern, replacement.replace("\\n", "\n"), text)
            if count != 1:
                raise ValueError(f"{file.name}: {pattern} applies {count} times, not once")
        for pattern, replacement in EVERYWHERE:
            text, count = re.subn(f"(?m){pattern}", replacement, text)
            left -= {pattern} if count else set()
        if file.stem == "models":
            text = text.replace("name: models,", "name: {{ .Values.models.claim }},")
            text = f"{{{{- if .Values.models.create }}}}\n{text}{{{{- end }}}}\n"
        made[CHART / "templates" / file.name] = HEAD + text
    if left:
        raise ValueError(f"these rules apply to no manifest: {left}")
    return made


def main() -> int:
    wanted = templates()
    if "--check" not in sys.argv[1:]:
        for file, text in wanted.items():
            file.write_text(text)
        return 0
    wrong = [file for file, text in wanted.items() if not file.is_file() or file.read_text() != text]
    wrong += [file for file in (CHART / "templates").glob("*.yaml") if file not in wanted]
    for file in wrong:
        print(f"{file.relative_to(ROOT)} differs from the manifests: run tools/gen_helm_chart.py")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
