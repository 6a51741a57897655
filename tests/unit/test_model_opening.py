"""Where a model's tokenizer comes from when some of its workers are damaged, gone or of another release."""

from __future__ import annotations

import asyncio
import shutil
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from tandem_frontend.config import FrontendConfig
from tandem_frontend.models import opening
from tandem_frontend.models.opening import ModelOpener, Shared

from tandem.domain.checkpoint import tokenizer_digest
from tandem.domain.worker import Worker, WorkerState
from tandem.errors import NotSupported, ServiceError, StartError, TandemError
from tests.unit.test_model_catalog import of

MODEL = Path(__file__).parents[2] / "models" / "tandem-demo"
SERVING, DRAINING = WorkerState.SERVING, WorkerState.DRAINING


class Senders:
    """What each worker does when its files are asked for: sends good ones, others than it registered, or fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.failures: dict[str, Exception] = {}
        self.damages: set[str] = set()
        self.asked: list[str] = []
        monkeypatch.setattr(opening, "copy_model_files", self._copy)

    async def _copy(self, channels: object, worker: Worker, directory: Path) -> None:
        self.asked.append(worker.worker_id)
        if worker.worker_id in self.failures:
            raise self.failures[worker.worker_id]
        await asyncio.to_thread(shutil.copytree, MODEL, directory, dirs_exist_ok=True)
        if worker.worker_id in self.damages:
            await asyncio.to_thread((directory / "tokenizer.json").write_text, "{}")


@pytest.fixture
def senders(monkeypatch: pytest.MonkeyPatch) -> Senders:
    return Senders(monkeypatch)


def workers(*states: WorkerState, digest: str = "") -> list[Worker]:
    """a, b, c … in these states, with the digest of the demo model's tokenizer."""
    pair = of("m", tokenizer=digest or tokenizer_digest(MODEL))
    return [replace(pair[0], worker_id=chr(ord("a") + number), state=state) for number, state in enumerate(states)]


async def read(given: list[Worker]) -> str:
    """The directory that the tokenizer was read from; it is removed at the end."""
    config = FrontendConfig(registry=("127.0.0.1:1",), long_prompt_processes=0)
    shared = cast("Shared", SimpleNamespace(config=config, fleet=SimpleNamespace(channels=None)))
    async with AsyncExitStack() as stack:
        model, directory = await ModelOpener(shared, None)._model("m", given, stack)
        assert model.name == "m"
        assert model.tokenizer.digest == tokenizer_digest(MODEL)
        assert directory.is_dir()
    assert not directory.exists()
    return directory.name


async def test_model_of_a_damaged_and_a_silent_worker_is_read_from_the_next(senders: Senders) -> None:
    senders.damages = {"a"}
    senders.failures = {"b": ServiceError("no response")}
    await read(workers(SERVING, SERVING, SERVING))
    assert senders.asked == ["a", "b", "c"]


async def test_model_is_read_from_a_serving_worker_first(senders: Senders) -> None:
    await read(workers(DRAINING, SERVING))
    assert senders.asked == ["b"]


async def test_files_that_break_a_library_are_asked_of_the_next_worker(senders: Senders) -> None:
    senders.failures = {"a": RecursionError("deep")}
    await read(workers(SERVING, SERVING))
    assert senders.asked == ["a", "b"]


async def test_model_asks_three_workers_at_most(senders: Senders) -> None:
    senders.failures = dict.fromkeys("abc", ServiceError("no response"))
    with pytest.raises(ServiceError, match="no response"):
        await read(workers(*[SERVING] * 4))
    assert senders.asked == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("failures", "wanted"),
    [
        # A worker that may respond later leaves hope: the model is tried again.
        ({"a": StartError("damaged"), "b": ServiceError("no response")}, ServiceError),
        ({"a": StartError("damaged"), "b": NotSupported("old release")}, StartError),
    ],
)
async def test_model_that_no_worker_can_send_fails_for_the_reason_that_may_pass(
    senders: Senders, failures: dict[str, Exception], wanted: type[TandemError]
) -> None:
    senders.failures = failures
    with pytest.raises(wanted):
        await read(workers(SERVING, SERVING))


async def test_reason_of_damaged_files_names_the_file_and_no_path_of_this_machine(
    senders: Senders, tmp_path: Path
) -> None:
    senders.damages = {"a"}
    shutil.copytree(MODEL, tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(StartError, match=r"tokenizer\.json") as refused:
        await read(workers(SERVING, digest=tokenizer_digest(tmp_path)))
    assert opening.DIRECTORY_PREFIX not in str(refused.value)


async def test_files_that_differ_from_what_the_worker_registered_are_refused(senders: Senders) -> None:
    senders.damages = {"a"}
    with pytest.raises(StartError, match="worker a sent another tokenizer than it registered"):
        await read(workers(SERVING))


async def test_model_without_workers_says_so(senders: Senders) -> None:
    with pytest.raises(ServiceError, match="no worker of model m is left"):
        await read([])
    assert senders.asked == []
