"""Lints the deployment files with third-party checkers; run by `make deploy-lint`.

hadolint reads the Dockerfiles, kubernetes-validate the manifests against Kubernetes' published schemas (strictly, after
kustomize where there is one), python-hcl2 the syntax of the Nomad job; `docker compose config` and
`systemd-analyze verify` where this machine has them. Standard library only; the checkers are installed into .cache.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from tools.own_environment import ROOT, own_environment

KUBERNETES_VERSION = "1.37"
DOCKERFILES = (*sorted(ROOT.glob("services/*/Dockerfile")), *sorted(ROOT.glob("deploy/images/*.Dockerfile")))
COMPOSE_FILES = (("docker-compose.yml",), ("docker-compose.yml", "docker-compose.gpu.yml"))


def main() -> int:
    checks = (dockerfiles, kubernetes, nomad, compose)
    failed = [check.__name__ for check in checks if not check()]
    print(f"failed: {', '.join(failed)}" if failed else "all checks that could run here passed")
    return 1 if failed else 0


def dockerfiles() -> bool:
    # DL3008: a version of Debian's goes when the next one comes, so a pin of it would break builds.
    return run("Dockerfiles", own("hadolint"), "--ignore", "DL3008", "--failure-threshold", "warning", *DOCKERFILES)


def kubernetes() -> bool:
    """The sets as kustomize makes them, without those of other projects' kinds; without it, the base as it is."""
    validate = (own("kubernetes-validate"), "--strict", "--kubernetes-version", KUBERNETES_VERSION, "--quiet")
    if shutil.which("kubectl") is None:
        print("  no kubectl here: the GPU set, which kustomize makes, is not checked")
        files = [file for file in sorted((ROOT / "deploy/kubernetes/base").glob("*.yaml")) if "kustom" not in file.name]
        return run("Kubernetes, base", *validate, *files, ROOT / "deploy/kubernetes/autoscaling/hpa/autoscalers.yaml")
    good = True
    for name in ("base", "gpu", "autoscaling/hpa"):
        made = subprocess.run(
            ["kubectl", "kustomize", str(ROOT / "deploy" / "kubernetes" / name)],
            capture_output=True,
            text=True,
            check=False,
        )
        if made.returncode:
            print(f"  kubectl kustomize {name}: {made.stderr}")
            return False
        with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
            file.write(made.stdout)
            file.flush()
            good &= run(f"Kubernetes, {name}", *validate, file.name)
    return good


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


def run(name: str, *command: str | Path) -> bool:
    """Whether the checker is content; prints what it says where it is not."""
    ended = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=ROOT, check=False)
    print(f"  {name}: {'right' if ended.returncode == 0 else 'WRONG'}")
    if ended.returncode:
        print(ended.stdout[-4000:] + ended.stderr[-4000:])
    return ended.returncode == 0


if __name__ == "__main__":
    sys.exit(main())
