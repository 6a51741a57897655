"""CPU time per token in a worker's process, without a GPU: `python -m benchmarks.worker_tokens --streams 256`.

The worker is real: its service, its legs, and SGLang's tokenizer manager as Tandem extends it. Only the scheduler is
fake: a process that receives the requests and sends, every 12.9 ms (an H200's step at 256 streams), one
BatchTokenIDOutput with a token for each of them to the worker's socket, as SGLang's scheduler does. Frontends are step
streams in this process. CPU time is that of the worker's main process only, by its own clock.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from array import array
from pathlib import Path

import psutil

from tandem.api.types.v1 import leg_pb2, sampling_pb2
from tandem.testing.direct_legs import direct_legs

MODEL = Path("models") / "tandem-demo"
STEP_S = 0.0129
PROMPT_TOKENS, NEW_TOKENS = 128, 512
TOKEN_ID = 501
NONE = (
    "input_token_logprobs_val", "input_token_logprobs_idx", "output_token_logprobs_val", "output_token_logprobs_idx",
    "input_top_logprobs_val", "input_top_logprobs_idx", "output_top_logprobs_val", "output_top_logprobs_idx",
    "input_token_ids_logprobs_val", "input_token_ids_logprobs_idx", "output_token_ids_logprobs_val",
    "output_token_ids_logprobs_idx", "output_token_entropy_val", "output_token_sampling_mask", "output_hidden_states",
    "routed_experts", "indexer_topk", "placeholder_tokens_idx", "placeholder_tokens_val",
)  # fmt: skip
"""Fields of SGLang's output that are empty for plain requests."""


def serve(socket_name: str, arguments: list[str]) -> None:
    """The worker, whose requests go to the player instead of its scheduler."""
    from tandem_decode.__main__ import main

    from tandem.engine.sglang.engine import SglangEngine

    build = SglangEngine._build

    def built(self) -> None:
        build(self)
        import zmq
        from sglang.srt.managers.io_struct import sock_send

        to_player = zmq.Context().socket(zmq.PUSH)
        to_player.connect(f"ipc://{socket_name}")
        to_player.send_pyobj(self._engine.port_args.tokenizer_ipc_name)
        self._engine.tokenizer_manager._dispatch_to_scheduler = lambda request: sock_send(to_player, request)

    SglangEngine._build = built
    sys.argv[1:] = arguments
    main()


def play(socket_name: str) -> None:
    """The scheduler that is played."""
    sys.path.insert(0, str(Path(sys.modules["tandem"].__file__).parent / "engine" / "sglang" / "standins"))
    import zmq
    from sglang.srt.managers.io_struct import AbortReq, sock_recv, sock_send
    from sglang.srt.observability.req_time_stats import SchedulerReqTimeStats

    context = zmq.Context()
    requests = context.socket(zmq.PULL)
    requests.bind(f"ipc://{socket_name}")
    outputs = context.socket(zmq.PUSH)
    outputs.connect(requests.recv_pyobj())
    stats = SchedulerReqTimeStats()
    left: dict[str, list[int]] = {}
    due_s = time.monotonic()
    while True:
        due_s = max(due_s + STEP_S, time.monotonic())
        while requests.poll(max(0.0, due_s - time.monotonic()) * 1_000):
            request = sock_recv(requests)
            if isinstance(request, AbortReq):
                left.pop(request.rid, None)
            else:
                left[request.rid] = [request.sampling_params.max_new_tokens, 0]
        if left:
            sock_send(outputs, step(left, stats))


def step(left: dict[str, list[int]], stats: object) -> object:
    """One step of all that runs; what has ended is taken out."""
    from sglang.srt.managers.io_struct import BatchTokenIDOutput, wrap_as_pickle

    rids, count = list(left), len(left)
    for budget in left.values():
        budget[1] += 1
    ended = [budget[1] >= budget[0] for budget in left.values()]
    batch = BatchTokenIDOutput(
        rids=rids,
        http_worker_ipcs=[None] * count,
        finished_reasons=[{"type": "length", "length": 1} if over else None for over in ended],
        decoded_texts=[""] * count,
        decode_ids=[array("q", [TOKEN_ID]) for _ in rids],
        read_offsets=[4] * count,
        output_ids=[array("q", [TOKEN_ID]) for _ in rids],
        skip_special_tokens=[True] * count,
        spaces_between_special_tokens=[True] * count,
        no_stop_trim=[False] * count,
        prompt_tokens=[PROMPT_TOKENS] * count,
        reasoning_tokens=[0] * count,
        completion_tokens=[budget[1] for budget in left.values()],
        cached_tokens=[0] * count,
        **dict.fromkeys(NONE),
        retraction_counts=[0] * count,
        customized_info=wrap_as_pickle({"tandem": [[{}] if over else [] for over in ended]}),
        cached_tokens_details=[None] * count,
        dp_ranks=[None] * count,
        image_tokens=[0] * count,
        audio_tokens=[0] * count,
        video_tokens=[0] * count,
        time_stats=wrap_as_pickle([stats] * count),
    )
    for rid, over in zip(rids, ended, strict=True):
        if over:
            del left[rid]
    return batch


async def measure(streams: int, frontends: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        socket_name, announced = f"{folder}/player", Path(folder) / "registry.json"
        registry = await _start("-m", "tandem_registry", "--port", "0", "--announce-file", str(announced))
        player = await _start("-m", "benchmarks.worker_tokens", "--play", socket_name)
        address = (await _announced(announced, registry))["address"]
        worker_file = Path(folder) / "worker.json"
        worker = await _start(
            "-m", "benchmarks.worker_tokens", "--serve", socket_name, "--registry", address, "--model", str(MODEL),
            "--role", "aggregated", "--device", "cpu", "--running-requests-max", "1024", "--port", "0",
            "--announce-file", str(worker_file),
        )  # fmt: skip
        try:
            announced_worker = await _announced(worker_file, worker)
            return await _ask(announced_worker["address"], announced_worker["pid"], streams, frontends)
        finally:
            for process in (worker, player, registry):
                process.terminate()
                await process.wait()


async def _ask(address: str, pid: int, streams: int, frontends: int) -> dict[str, float]:
    process = psutil.Process(pid)
    all_legs = []
    async with asyncio.TaskGroup() as group:
        done = asyncio.Event()
        ready = [asyncio.Event() for _ in range(frontends)]

        async def frontend(number: int) -> None:
            async with direct_legs(address) as legs:
                share = range(number, streams, frontends)
                all_legs.extend([await legs.start(_request(legs.worker, index)) for index in share])
                ready[number].set()
                await done.wait()

        for number in range(frontends):
            group.create_task(frontend(number))
        for event in ready:
            await event.wait()
        await asyncio.sleep(1.0)
        before, begin_s, sent = _cpu_s(process), time.monotonic(), sum(len(leg.token_ids) for leg in all_legs)
        await asyncio.sleep(4.0)
        tokens = sum(len(leg.token_ids) for leg in all_legs) - sent
        cpu_s, elapsed_s = _cpu_s(process) - before, time.monotonic() - begin_s
        for leg in all_legs:
            await leg.finish()
        done.set()
    assert all(len(leg.token_ids) == NEW_TOKENS for leg in all_legs), "tokens were lost"
    return {
        "streams": streams,
        "frontends": frontends,
        "tokens_per_s": round(tokens / elapsed_s),
        "worker_cores": round(cpu_s / elapsed_s, 3),
        "us_per_token": round(cpu_s / tokens * 1e6, 1),
    }


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def _request(worker, index: int) -> leg_pb2.LegRequest:
    return leg_pb2.LegRequest(
        request_id=f"r{index}-{os.getpid()}",
        attempt=1,
        worker_epoch=worker.epoch,
        model=worker.capabilities.model,
        token_ids=[20 + (index * 7 + place) % 1000 for place in range(PROMPT_TOKENS)],
        stopping=sampling_pb2.Stopping(max_tokens=NEW_TOKENS, ignore_eos=True),
    )


async def _start(*arguments: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(sys.executable, *arguments, stderr=asyncio.subprocess.DEVNULL)


async def _announced(file: Path, process: asyncio.subprocess.Process) -> dict:
    async with asyncio.timeout(180):
        while not (announced := _read(file)):
            if process.returncode is not None:
                raise SystemExit(f"a server process exited with status {process.returncode}")
            await asyncio.sleep(0.1)
    return json.loads(announced)


def _read(file: Path) -> str:
    return file.read_text() if file.exists() else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", default="64,256,512", help="numbers of streams, comma-separated")
    parser.add_argument("--frontends", type=int, default=4)
    parser.add_argument("--serve", metavar="SOCKET", help=argparse.SUPPRESS)
    parser.add_argument("--play", metavar="SOCKET", help=argparse.SUPPRESS)
    given, rest = parser.parse_known_args()
    if given.serve:
        serve(given.serve, rest)
    elif given.play:
        play(given.play)
    else:
        for streams in map(int, given.streams.split(",")):
            print(json.dumps(asyncio.run(measure(streams, given.frontends))), flush=True)


if __name__ == "__main__":
    main()
