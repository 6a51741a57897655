"""When a local cluster can no longer serve, by the roles that its workers have now."""

from __future__ import annotations

from pathlib import Path

import pytest

from tandem.api.registry.v1 import registry_service_pb2 as pb
from tandem.client import calls
from tandem.domain.worker import WorkerRole
from tandem.errors import ServiceError
from tandem.local_cluster.cluster import ClusterSpec, LocalCluster
from tandem.local_cluster.restarts import Restarts
from tandem.rpc.convert import worker_to_proto
from tests.unit.support.registry_workers import make_worker

PREFILL, DECODE = WorkerRole.PREFILL, WorkerRole.DECODE


def cluster_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, roles: dict[str, WorkerRole] | None) -> LocalCluster:
    """A cluster that was not started, whose registry lists workers in these roles; None: it does not answer."""

    async def list_workers(address: str, *, tls: object = None) -> list[pb.ListedWorker]:
        if roles is None:
            raise ServiceError("gone")
        return [pb.ListedWorker(worker=worker_to_proto(make_worker(name, role=role))) for name, role in roles.items()]

    monkeypatch.setattr(calls, "list_workers", list_workers)
    return LocalCluster(ClusterSpec(model=tmp_path, log_directory=tmp_path, prefill=1, decode=2))


@pytest.mark.parametrize(
    ("roles", "is_hopeless"),
    [
        ({"decode-0": DECODE, "decode-1": PREFILL}, False),
        ({"decode-0": DECODE, "decode-1": DECODE}, True),
        (None, True),
    ],
    ids=["another-took-its-role", "none-took-its-role", "no-registry"],
)
async def test_a_cluster_without_its_prefill_worker_serves_while_another_worker_has_that_role(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, roles: dict[str, WorkerRole] | None, is_hopeless: bool
) -> None:
    cluster = cluster_of(tmp_path, monkeypatch, roles)
    restarts = Restarts(cluster, lambda line: None)
    await restarts._give_up(cluster.process("prefill-0"))
    assert restarts._hopeless.is_set() is is_hopeless


async def test_a_cluster_of_two_models_serves_while_one_of_them_has_a_pair(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster_of(tmp_path, monkeypatch, None)
    cluster = LocalCluster(ClusterSpec(model=tmp_path, log_directory=tmp_path, more_models={"other": tmp_path}))
    assert {worker.name: worker.flags["model-name"] for worker in cluster.workers} == {
        **dict.fromkeys(("prefill-0", "decode-0"), tmp_path.name),
        **dict.fromkeys(("prefill-1", "decode-1"), "other"),
    }
    assert not {"model", "model-name"} & cluster.frontend.flags.keys(), "frontends read the tokenizers from workers"
    restarts = Restarts(cluster, lambda line: None)
    await restarts._give_up(cluster.process("prefill-0"))
    assert not restarts._hopeless.is_set()
    await restarts._give_up(cluster.process("decode-1"))
    assert restarts._hopeless.is_set(), "a prefill worker of one model and a decode worker of another are no pair"
