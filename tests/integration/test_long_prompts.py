"""Long prompts become tokens in processes of their own: in order, and whatever happens to the processes."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio
from tandem_frontend.preparation.encoding import process as process_module
from tandem_frontend.preparation.encoding.pool import EncoderPool
from tandem_frontend.preparation.encoding.process import EncoderProcess
from tandem_frontend.preparation.tokenizer import BLOCKING_CHARS_MAX, THREAD_CHARS_MAX, Tokenizer

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.api.frontend.v1.inference_service_pb2_grpc import InferenceServiceStub
from tandem.api.types.v1 import leg_pb2
from tandem.api.types.v1.sampling_pb2 import Stopping
from tandem.errors import ContextExceeded, Draining, ServiceError
from tandem.local_cluster.cluster import ClusterSpec, LocalCluster
from tandem.rpc.channels import open_channel
from tandem.testing.eventually import assert_eventually
from tandem.testing.fake_model import write_fake_model

CONTEXT_TOKENS = 2**17
LONG = "The registry knows who is alive; 東京 🙂. " * (THREAD_CHARS_MAX // 35)
THREADED = LONG[: THREAD_CHARS_MAX // 2]
SHORT = LONG[: BLOCKING_CHARS_MAX // 2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_fake_model(tmp_path_factory.mktemp("model"), max_position_embeddings=CONTEXT_TOKENS)


@pytest_asyncio.fixture
async def tokenizer(model: Path) -> AsyncIterator[Tokenizer]:
    tokenizer = Tokenizer.open(model, processes=1)
    yield tokenizer
    await tokenizer.close()


def pool_of(tokenizer: Tokenizer) -> EncoderPool:
    assert tokenizer._pool is not None
    return tokenizer._pool


async def encode(tokenizer: Tokenizer, text: str = LONG) -> list[int]:
    return list(await tokenizer.encode(text, add_special_tokens=True, field="chat"))


async def stopped(tokenizer: Tokenizer, count: int = 1) -> tuple[int, list[asyncio.Task[list[int]]]]:
    """The process, which is stopped with a text before it, and the callers: the first is served, the others wait."""
    if not pool_of(tokenizer).pids:
        await encode(tokenizer)
    (pid,) = pool_of(tokenizer).pids
    os.kill(pid, signal.SIGSTOP)
    callers = [asyncio.create_task(encode(tokenizer)) for _ in range(count)]
    await assert_eventually(lambda: (len(pool_of(tokenizer)._busy), pool_of(tokenizer).waiting_count) == (1, count - 1))
    return pid, callers


async def test_the_tokens_are_those_of_a_thread(model: Path, tokenizer: Tokenizer) -> None:
    threaded = Tokenizer.open(model)
    for text in (LONG, LONG + "x"):
        assert await encode(tokenizer, text) == await encode(threaded, text)
    assert len(pool_of(tokenizer).pids) == 1


async def test_a_leg_takes_them_over_as_they_are(tokenizer: Tokenizer) -> None:
    ids = await tokenizer.encode(LONG, add_special_tokens=False)
    leg = leg_pb2.LegRequest(token_ids=ids)
    assert leg.token_ids == ids
    assert tokenizer.decode(leg.token_ids) == LONG


async def test_nothing_is_started_for_texts_that_need_no_process(tokenizer: Tokenizer) -> None:
    await encode(tokenizer, SHORT)
    await encode(tokenizer, THREADED)
    assert pool_of(tokenizer).pids == []


async def test_shorter_texts_are_not_stuck_behind_a_long_one(tokenizer: Tokenizer) -> None:
    pid, callers = await stopped(tokenizer, 2)
    assert tokenizer.decode(await encode(tokenizer, SHORT)) == SHORT
    assert tokenizer.decode(await encode(tokenizer, THREADED)) == THREADED
    assert not any(caller.done() for caller in callers)
    os.kill(pid, signal.SIGCONT)
    first, second = await asyncio.gather(*callers)
    assert first == second


async def test_more_tokens_than_allowed_are_refused_and_the_process_lives_on(tokenizer: Tokenizer) -> None:
    await encode(tokenizer)
    pids = pool_of(tokenizer).pids
    with pytest.raises(ContextExceeded) as refused:
        await encode(tokenizer, "é\u0301" * 4 * CONTEXT_TOKENS)
    assert refused.value.field == "chat"
    assert refused.value.metadata["limit"] == str(CONTEXT_TOKENS)
    assert tokenizer.decode(await encode(tokenizer)) == LONG
    assert pool_of(tokenizer).pids == pids


async def test_a_crash_is_an_error_of_one_request(tokenizer: Tokenizer) -> None:
    pid, callers = await stopped(tokenizer, 3)
    os.kill(pid, signal.SIGKILL)
    first, *others = await asyncio.gather(*callers, return_exceptions=True)
    assert isinstance(first, ServiceError)
    assert (first.code, first.reason) == ("UNAVAILABLE", "UNAVAILABLE")
    assert [tokenizer.decode(ids) for ids in others if isinstance(ids, list)] == [LONG, LONG]
    assert pid not in pool_of(tokenizer).pids
    assert not psutil.pid_exists(pid)


async def test_a_death_between_two_texts_is_no_error(tokenizer: Tokenizer) -> None:
    await encode(tokenizer)
    (pid,) = pool_of(tokenizer).pids
    os.kill(pid, signal.SIGKILL)
    await assert_eventually(lambda: pool_of(tokenizer)._idle[0].has_ended)
    assert tokenizer.decode(await encode(tokenizer)) == LONG
    assert pool_of(tokenizer).pids != [pid]


async def test_one_that_does_not_answer_is_killed(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_module, "ANSWER_TIMEOUT_S", 0.3)
    monkeypatch.setattr(process_module, "END_TIMEOUT_S", 0.1)
    pid, (caller,) = await stopped(tokenizer)
    with pytest.raises(ServiceError, match="did not answer within"):
        await caller
    assert not psutil.pid_exists(pid)
    monkeypatch.undo()
    assert tokenizer.decode(await encode(tokenizer)) == LONG


async def test_a_caller_that_leaves_makes_room(tokenizer: Tokenizer) -> None:
    pid, callers = await stopped(tokenizer, 3)
    callers[0].cancel()
    callers[1].cancel()
    await asyncio.wait(callers[:2])
    assert pool_of(tokenizer).waiting_count == 1, "the text that was begun is encoded to its end"
    os.kill(pid, signal.SIGCONT)
    assert tokenizer.decode(await callers[2]) == LONG
    assert pool_of(tokenizer).pids == [pid]


async def test_the_end_refuses_what_waits_and_leaves_no_process(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer.open(model, processes=1)
    pid, callers = await stopped(tokenizer, 2)
    await tokenizer.close()
    first, second = await asyncio.gather(*callers, return_exceptions=True)
    assert isinstance(first, ServiceError)
    assert isinstance(second, Draining)
    assert not psutil.pid_exists(pid)
    monkeypatch.setattr(EncoderProcess, "start", None)
    with pytest.raises(Draining):
        await encode(tokenizer)
    await tokenizer.close()


async def test_an_end_while_a_process_is_starting_leaves_none(model: Path) -> None:
    tokenizer = Tokenizer.open(model, processes=1)
    before = {child.pid for child in psutil.Process().children()}
    caller = asyncio.create_task(encode(tokenizer))
    await assert_eventually(lambda: {child.pid for child in psutil.Process().children()} - before)
    await tokenizer.close()
    with pytest.raises(Draining):
        await caller
    assert {child.pid for child in psutil.Process().children()} <= before


async def test_a_file_that_has_changed_is_not_another_tokenizer(tmp_path: Path) -> None:
    """A process that starts later than its frontend must not read other tokens from a file of the same name."""
    model = write_fake_model(tmp_path / "model", max_position_embeddings=CONTEXT_TOKENS)
    tokenizer = Tokenizer.open(model, processes=1)
    file = model / "tokenizer.json"
    content = file.read_text()
    for changed, sentence in ((content + "\n", "has changed since the frontend started"), (None, "No such file")):
        file.unlink() if changed is None else file.write_text(changed)
        with pytest.raises(ServiceError, match=sentence) as failed:
            await encode(tokenizer)
        assert str(tmp_path) not in failed.value.message
    file.write_text(content)
    assert tokenizer.decode(await encode(tokenizer)) == LONG
    await tokenizer.close()


@pytest.mark.parametrize("number", [signal.SIGCONT, signal.SIGSTOP])
async def test_it_ends_with_its_frontend_however_that_ends(model: Path, number: signal.Signals) -> None:
    """Also where it is stopped, and would not see the end of its socket."""
    program = (
        "import asyncio, os, signal, sys; from pathlib import Path;"
        "from tandem_frontend.preparation.tokenizer import Tokenizer\n"
        "async def main():\n"
        "    tokenizer = Tokenizer.open(Path(sys.argv[1]), processes=1)\n"
        "    await tokenizer.encode('a b ' * 20_000, add_special_tokens=True)\n"
        "    print(*tokenizer._pool.pids, flush=True)\n"
        "    os.kill(tokenizer._pool.pids[0], int(sys.argv[2]))\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "asyncio.run(main())"
    )
    ended = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", program, str(model), str(int(number))], capture_output=True, text=True
    )
    assert ended.returncode == -signal.SIGKILL
    pid = int(ended.stdout)
    await assert_eventually(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)


def encoders(frontend_pid: int) -> list[psutil.Process]:
    children = psutil.Process(frontend_pid).children()
    return [child for child in children if "tandem_frontend.preparation.encoding" in child.cmdline()]


async def answer(channel: Any, **request: Any) -> tuple[int, str]:
    """Tokens of the prompt, and the text."""
    stub: Any = InferenceServiceStub(channel)
    whole = await stub.GenerateUnary(
        pb.GenerateUnaryRequest(
            generate=pb.GenerateRequest(stopping=Stopping(max_tokens=4, ignore_eos=True), **request)
        )
    )
    return whole.finish.usage.prompt_tokens, whole.text


async def test_a_frontend_has_one_and_takes_it_along(model: Path, tmp_path: Path) -> None:
    flags = {"kv-capacity-tokens": str(CONTEXT_TOKENS)}
    roles: dict[str, Any] = {"prefill": 0, "decode": 0, "aggregated": 1}
    spec = ClusterSpec(model=model, engine="simulated", log_directory=tmp_path, worker_flags=flags, **roles)
    async with LocalCluster(spec) as cluster, open_channel(cluster.frontend.address) as channel:
        pid = cluster.frontend.pid
        await answer(channel, prompt=THREADED)
        assert encoders(pid) == []
        ids = await encode(Tokenizer.open(model))
        answers = [
            await answer(channel, prompt=LONG),
            await answer(channel, token_ids={"ids": ids}),
        ]
        assert answers[0] == answers[1]
        assert answers[0][0] == len(ids)
        (encoder,) = encoders(pid)
        assert encoder.nice() > psutil.Process(pid).nice()
        chat = await answer(channel, chat={"messages": [{"role": "user", "content": LONG}]})
        assert chat[0] > len(ids)
        assert encoders(pid) == [encoder]
    assert not encoder.is_running()
