"""Environment variables of an engine's processes, and errors for what the machine lacks."""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from tandem.domain.worker import WorkerRole
from tandem.engine.settings import EngineSettings
from tandem.engine.sglang import environment, network_devices
from tandem.errors import StartError


def settings(host: str) -> EngineSettings:
    return EngineSettings(role=WorkerRole.DECODE, model_path=Path("m"), model_name="m", host=host)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_sockets_are_given_an_address_where_the_host_is_a_name(host: str, tmp_path: Path) -> None:
    found = environment.variables(settings(host), "cpu", tmp_path)["SGLANG_HOST_IP"]
    assert found is not None
    assert ipaddress.ip_address(found).is_loopback


CPUS_OF_RANKS = "SGLANG_CPU_OMP_THREADS_BIND"
INTERFACES = ("UCX_NET_DEVICES", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def test_an_engine_on_loopback_uses_no_other_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "if_nameindex", lambda: [(1, "lo"), (2, "eth0")])
    for host in ("127.0.0.1", "127.0.0.2"):
        assert [environment.defaults(settings(host), "cpu").get(name) for name in INTERFACES] == ["lo"] * 3
    beyond = environment.defaults(settings("192.0.2.1"), "cuda")
    assert [beyond.get(name) for name in INTERFACES] == [None, "lo", None]
    monkeypatch.setattr(socket, "if_nameindex", lambda: [(1, "lo0")])
    assert not set(INTERFACES) & set(environment.defaults(settings("127.0.0.1"), "cpu"))


def test_engines_of_one_process_share_a_registration_key(tmp_path: Path) -> None:
    keys = {environment.variables(settings("::1"), "cpu", tmp_path)[environment.REGISTRATION_KEY] for _ in range(2)}
    assert len(keys) == 1
    assert len(str(keys.pop())) == 32


def test_a_host_without_an_address_is_named(tmp_path: Path) -> None:
    with pytest.raises(StartError, match=r"advertise_host: unknown\.invalid does not resolve to an address"):
        environment.variables(settings("unknown.invalid"), "cpu", tmp_path)


@pytest.mark.engine_sglang
def test_a_gpu_that_is_not_there_is_named() -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(StartError, match="device: is cuda, but PyTorch finds no usable GPU"):
        environment.resolve_device("cuda")
    assert environment.resolve_device("auto") == "cpu"


def test_a_decode_leg_waits_for_its_kv_as_long_as_the_setting_says() -> None:
    values = environment.defaults(replace(settings("127.0.0.1"), handover_timeout_s=7.2), "cpu")
    assert values["SGLANG_DISAGGREGATION_WAITING_TIMEOUT"] == "8"
    assert int(values["SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT"]) >= 3_600


def test_an_engine_of_several_ranks_starts_on_a_cpu_whatever_its_numa_nodes() -> None:
    def bound(device: str = "cpu", **extra: object) -> str | None:
        return environment.defaults(replace(settings("127.0.0.1"), extra=extra), device).get(CPUS_OF_RANKS)

    assert bound() is None
    assert bound(tp_size=2) == "0|1"
    assert bound(tp_size=2, pp_size=2) == "0|1|2|3"
    assert bound("cuda", tp_size=2) is None
    assert bound(tp_size="two") is None, "SGLang refuses it by name"


def test_settings_of_ucx_override_the_environment_and_the_defaults(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given = replace(settings("127.0.0.1"), ucx={"UCX_NET_DEVICES": "lo", "UCX_TLS": "tcp"})
    values = environment.variables(given, "cpu", tmp_path)
    assert (values["UCX_NET_DEVICES"], values["UCX_TLS"]) == ("lo", "tcp")
    assert not [name for name in environment.variables(settings("127.0.0.1"), "cpu", tmp_path) if "UCX" in name]


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("net/lo", "net/eth1", "infiniband/mlx5_0/ports/1", "infiniband/mlx5_0/ports/2"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.setattr(network_devices, "INTERFACES", tmp_path / "net")
    monkeypatch.setattr(network_devices, "RDMA_DEVICES", tmp_path / "infiniband")


@pytest.mark.usefixtures("devices")
@pytest.mark.parametrize("listed", [None, "all", "eth1", "lo,eth1", "mlx5_0:1", "mlx5_0", "^docker0", "mlx5_*:1"])
def test_network_devices_of_the_machine_are_taken(listed: str | None) -> None:
    network_devices.check_devices(listed)


@pytest.mark.usefixtures("devices")
@pytest.mark.parametrize("listed", ["eth9", "mlx5_0:3", "lo,ib0", ""])
def test_a_network_device_that_is_not_there_is_named(listed: str) -> None:
    with pytest.raises(StartError, match=r"ucx_net_devices: .* is not a network device of this machine: eth1, lo, mlx"):
        network_devices.check_devices(listed)
