"""What happens to the composed cluster, in order; each step says what must follow, and reports what it saw.

A step begins from a healthy cluster and leaves one behind. The order is that of a first day: start, use, lose a
worker, take one away, lose Consul, and what a person gets wrong.
"""

from __future__ import annotations

import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from tests.compose import calls
from tests.compose.cluster import OURS, Cluster, free_port, until
from tests.compose.docker import REPOSITORY
from tests.compose.standins import python_image

Report = Callable[[str], None]
KILLED = 137
DEMO_MODEL = REPOSITORY / "models" / "tandem-demo"


def starts(cluster: Cluster, report: Report) -> None:
    """Everything comes up healthy, in the order of its needs."""
    since_s = time.time()
    took_s = cluster.up()
    each = ", ".join(f"{service} {after_s:.0f}" for service, after_s in cluster.healthy_after_s(since_s).items())
    report(f"docker compose up --wait: {took_s:.0f} s; from start to healthy, in s: {each}")


def is_confined(cluster: Cluster, report: Report) -> None:
    """No process is root, none can write to the image, and nothing in it can build or install."""
    for service in OURS:
        inside = cluster.compose(
            *("exec", "-T", service, "sh", "-c"),
            "id -u; touch /opt/x /x 2>/dev/null && echo writable; command -v pip pip3 gcc; touch /tmp/x && echo ends",
            check=False,
        ).split()
        assert inside == ["10001", "ends"], f"{service}: {inside}"
    for service in ("registry-1", "frontend-1", "envoy"):
        found = cluster.compose(
            "exec", "-T", service, "sh", "-c", "find / -type d -name torch 2>/dev/null", check=False
        )
        assert not found.strip(), f"{service} has {found}"
    report("user 10001, read-only, no pip, no compiler in all nine; no torch in registry, frontend and edge")


def answers(cluster: Cluster, report: Report) -> None:
    """OpenAI's client streams; gRPC shows that KV moved between two containers."""
    text, pieces = calls.chat(cluster.address)
    assert "barn" in text, text
    assert pieces > 1
    finish = calls.generate(cluster.address)
    assert finish.timings.kv_transfer_bytes > 0
    route = finish.route
    report(
        f"openai client: {text.strip()!r} in {pieces} pieces; gRPC: {route.prefill_worker_id} and "
        f"{route.decode_worker_id}, {finish.timings.kv_transfer_bytes:,} bytes of KV"
    )


def survives_a_kill(cluster: Cluster, report: Report) -> None:
    """`docker compose kill decode-1` in mid-stream: the stream goes on elsewhere, and its text is the same."""
    undisturbed = calls.begin_story(cluster.address)
    undisturbed.finish()
    story, others = calls.begin_story_on(cluster.address, "decode-1")
    before = len(story.text)
    cluster.compose("kill", "decode-1")
    finish = story.finish()
    assert cluster.state("decode-1")["ExitCode"] == KILLED
    assert finish.route.decode_worker_id == "decode-2", finish.route
    assert finish.route.attempt > 1, finish.route
    assert finish.usage.completion_tokens == calls.STORY_TOKENS
    assert before < len(story.text)
    assert story.text == undisturbed.text, "another text than without the kill"
    for other in others:
        assert other.finish().usage.completion_tokens == calls.STORY_TOKENS
    report(
        f"decode-1 killed after {before} of {len(story.text)} characters: the stream went on with "
        f"{finish.route.decode_worker_id} (attempt {finish.route.attempt}), same text; {len(others)} more streams whole"
    )
    took_s = cluster.up("decode-1")
    report(f"docker compose up decode-1: healthy again after {took_s:.0f} s")


def restarts_after_a_crash(cluster: Cluster, report: Report) -> None:
    """A process that dies by itself is started again by Docker."""
    cluster.kill_process("decode-2")
    took_s = until(
        lambda: cluster.state("decode-2"), lambda seen: seen["RestartCount"] == 1, 60, "a restart of decode-2"
    )
    took_s += cluster.wait_health("decode-2", "healthy")
    calls.generate(cluster.address)
    report(f"decode-2's process killed from outside: restarted by Docker, healthy after {took_s:.0f} s")


def drains(cluster: Cluster, report: Report) -> None:
    """`docker compose stop` lets streams end: none is cut, none has to go on elsewhere, and the status is 0."""
    for service, worker in (("decode-2", "decode-2"), ("prefill-2", "prefill-2"), ("frontend-1", "")):
        story, others = (
            calls.begin_story_on(cluster.address, worker) if worker else (calls.begin_story(cluster.address), [])
        )
        cluster.compose("stop", service)
        state = cluster.state(service)
        finish = story.finish()
        assert finish.route.attempt == 1, finish.route
        assert all(other.finish() for other in others)
        assert state["ExitCode"] == 0, f"{service} ended with {state['ExitCode']}:\n{cluster.logs(service)[-2000:]}"
        calls.generate(cluster.address)
        took_s = cluster.up(service)
        report(f"{service} stopped under {1 + len(others)} streams: all whole, status 0; back after {took_s:.0f} s")


def outlives_consul(cluster: Cluster, report: Report) -> None:
    """Consul restarts and comes back empty: no request notices, and the fleet is entered again."""
    ended = threading.Event()
    served: list[str] = []
    broken: list[str] = []

    def ask() -> None:
        while not ended.is_set():
            try:
                calls.generate(cluster.address)
                served.append("")
            except Exception as problem:
                broken.append(repr(problem))

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        cluster.compose("restart", "consul")
        cluster.wait_health("consul", "healthy")
        wanted = {
            "registry-1",
            "registry-2",
            "frontend-1",
            "frontend-2",
            "prefill-1",
            "prefill-2",
            "decode-1",
            "decode-2",
        }
        took_s = until(lambda: _members(cluster), lambda seen: wanted <= seen, 90, "all members in Consul again")
    finally:
        ended.set()
        asking.join()
    assert not broken, broken
    report(
        f"Consul restarted empty under {len(served)} requests: 0 failed; all eight members entered again after "
        f"{took_s:.0f} s"
    )


def lacks_its_model(cluster: Cluster, report: Report) -> None:
    """No model under the mount: one sentence, red, and green by itself when the model comes."""
    with tempfile.TemporaryDirectory(prefix="tandem-models-") as models:
        Path(models).chmod(0o755)
        cluster.compose("up", "--detach", "--no-deps", "--no-build", "decode-2", "frontend-2", MODELS=models)
        for service in ("decode-2", "frontend-2"):
            cluster.wait_log(service, "model: there is no directory /models/tandem-demo")
            assert cluster.health(service) != "healthy"
        shutil.copytree(DEMO_MODEL, Path(models) / "tandem-demo")
        took_s = max(cluster.wait_health(service, "healthy") for service in ("decode-2", "frontend-2"))
        calls.generate(cluster.address)
        # Before the directory goes, or the containers would hold on to it.
        cluster.up("decode-2", "frontend-2")
    report(f"no model: both said so and were restarted; healthy by themselves {took_s:.0f} s after it came")


def lacks_a_gpu(cluster: Cluster, report: Report) -> None:
    """A GPU is asked for where there is none: one sentence and status 1."""
    run = ("run", "--rm", "--no-deps", "--env=TANDEM_DECODE_DEVICE=cuda", "decode-2")
    said = cluster.compose(*run, check=False)
    sentence = "device: is cuda, but PyTorch finds no usable GPU"
    assert sentence in said, said
    report(f"no GPU: {sentence!r}")


def finds_its_port_taken(cluster: Cluster, report: Report) -> None:
    """A published port is another's: Docker says so, and the next `up` works. Inside, the process says it."""
    with socket.socket() as thief:
        thief.bind(("127.0.0.1", 0))
        thief.listen()
        taken = thief.getsockname()[1]
        said = cluster.compose("up", "--detach", "--no-deps", "--no-build", "envoy", check=False, HTTP_PORT=str(taken))
        assert "address already in use" in said or "port is already allocated" in said, said
    cluster.up("envoy")
    shared = ("run", "--detach", f"--network=container:{cluster.container('registry-1')}", "--restart=unless-stopped")
    second = cluster.docker.run(
        *shared, cluster.docker.inspect(cluster.container("registry-1"))["Config"]["Image"]
    ).strip()
    try:
        sentence = "cannot listen on 0.0.0.0:7400: the port is in use"
        until(lambda: cluster.docker.run("logs", second), lambda seen: sentence in seen, 60, sentence)
        cluster.compose("stop", "registry-1")
        cluster.compose("start", "registry-1")
        cluster.wait_health("registry-1", "healthy")
    finally:
        cluster.docker.run("rm", "--force", second)
    report(f"a published port taken: Docker says so, the next up works; one taken inside: {sentence!r}")


def starts_before_consul(cluster: Cluster, report: Report) -> None:
    """Consul is not there at the start of a registry: one sentence, red, and green by itself when it comes."""
    cluster.compose("stop", "consul")
    cluster.compose("up", "--detach", "--no-deps", "--no-build", "--force-recreate", "registry-2")
    cluster.wait_log("registry-2", "not ready: Consul is unreachable, retrying")
    cluster.wait_health("registry-2", "unhealthy")
    calls.generate(cluster.address)
    cluster.compose("start", "consul")
    took_s = cluster.wait_health("registry-2", "healthy")
    report(
        f"no Consul at the start: said so, unhealthy, requests went on; healthy by itself {took_s:.0f} s after it came"
    )


def goes_away(cluster: Cluster, report: Report) -> None:
    """`docker compose down` drains all and leaves nothing."""
    cluster.compose("stop")
    statuses = {service: cluster.state(service)["ExitCode"] for service in OURS}
    cluster.compose("down", "--volumes")
    left = cluster.docker.run(
        "ps",
        "--all",
        "--quiet",
        "--filter",
        "label=com.docker.compose.project=" + cluster.settings["COMPOSE_PROJECT_NAME"],
    )
    assert not left.strip()
    assert set(statuses.values()) == {0}, statuses
    report("docker compose stop: every process drained with status 0; down left nothing")


STEPS = (
    starts,
    is_confined,
    answers,
    survives_a_kill,
    restarts_after_a_crash,
    drains,
    outlives_consul,
    lacks_its_model,
    lacks_a_gpu,
    finds_its_port_taken,
    starts_before_consul,
    goes_away,
)


def settings() -> dict[str, str]:
    """Variables of docker-compose.yml for a run beside whatever else this machine runs."""
    return {"COMPOSE_PROJECT_NAME": "tandem-test", "HTTP_PORT": str(free_port()), "PYTHON_IMAGE": python_image()}


def _members(cluster: Cluster) -> set[str]:
    """Hosts of the instances that Consul's agent holds."""
    asked = cluster.compose(
        *("exec", "-T", "registry-1", "python3", "-c"),
        "import json, urllib.request as r; print(*(s['Address'] for s in "
        "json.load(r.urlopen('http://consul:8500/v1/agent/services')).values()))",
        check=False,
    )
    return set(asked.split())
