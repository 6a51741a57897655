"""`tandem generate`: one completion, streamed to the terminal."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from dataclasses import dataclass

from google.protobuf.json_format import MessageToJson
from rich.console import Console

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.api.types.v1 import generation_pb2
from tandem.client import calls
from tandem.domain.sampling import SCALARS
from tandem.errors import ConfigError, NotSupported, NoWorkers, StartError
from tandem.exit_codes import EXIT_INTERRUPTED
from tandem.rpc.convert import kv_check_text, placement_text
from tandem.tls.paths import Tls


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """The options of one `tandem generate`; None: not given."""

    prompt: str
    chat: bool | None
    """None: as a chat message if the model has a chat template, else as plain text."""
    system: str | None
    model: str | None
    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    repetition_penalty: float | None
    seed: int | None
    logprobs: int | None
    """Number of alternatives to show for each token; None: no log probabilities."""
    stop: tuple[str, ...]
    as_json: bool
    tls: Tls | None = None
    """None: plaintext."""


async def generate(address: str, asked: Asked, console: Console) -> int:
    """Stream a completion to standard output, and a summary to `console`. Returns the exit status.

    Raises:
        ConfigError: two options contradict each other.
        TandemError: the request was rejected or failed.
    """
    if asked.system is not None and asked.chat is False:
        raise ConfigError("system", "requires --chat: plain text has no system message")
    streaming = asyncio.create_task(_stream(address, asked, console))
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, streaming.cancel)
    try:
        await streaming
    except asyncio.CancelledError:
        console.print("\ncancelled", style="dim")
        return EXIT_INTERRUPTED
    finally:
        loop.remove_signal_handler(signal.SIGINT)
    return 0


async def _stream(address: str, asked: Asked, console: Console) -> None:
    request = await build_request(address, asked)
    await print_events(address, request, console, as_json=asked.as_json, hint_at_trace=True, tls=asked.tls)


async def build_request(address: str, asked: Asked) -> pb.GenerateRequest:
    """Build the request. Lists the models first, to learn whether the model has a chat template.

    Raises:
        StartError: `address` is not a Tandem frontend.
        NoWorkers: no worker is alive.
    """
    request = pb.GenerateRequest(model=asked.model)
    takes_messages = await _takes_messages(address, asked)
    if takes_messages if asked.chat is None else asked.chat:
        if asked.system is not None:
            request.chat.messages.add(role="system", content=asked.system)
        request.chat.messages.add(role="user", content=asked.prompt)
    else:
        request.prompt = asked.prompt
    for name in SCALARS:
        if getattr(asked, name) is not None:
            setattr(request.sampling, name, getattr(asked, name))
    if asked.max_tokens is not None:
        request.stopping.max_tokens = asked.max_tokens
    request.stopping.stop.extend(asked.stop)
    if asked.logprobs is not None:
        request.logprobs.top_logprobs = asked.logprobs
    return request


async def print_events(
    address: str,
    request: pb.GenerateRequest,
    console: Console,
    *,
    as_json: bool = False,
    hint_at_trace: bool = False,
    tls: Tls | None = None,
) -> pb.GenerateFinish:
    """Print the events of a stream as they arrive; returns its finish.

    `hint_at_trace`: also print the `tandem trace` command; not for a cluster that stops right after the request.
    """
    finish = pb.GenerateFinish()
    route = pb.Route()
    request_id = ""
    logprobs: list[generation_pb2.TokenLogprob] = []
    async with contextlib.aclosing(calls.generate(address, request, tls=tls)) as responses:
        async for response in responses:
            if as_json:
                print(MessageToJson(response, indent=None, preserving_proto_field_name=True), flush=True)
            elif response.HasField("chunk"):
                sys.stdout.write(response.chunk.text)
                sys.stdout.flush()
                logprobs.extend(response.chunk.logprobs)
            if response.HasField("accepted"):
                route.CopyFrom(response.accepted.route)
                request_id = response.accepted.request_id
            elif response.HasField("finish"):
                finish.CopyFrom(response.finish)
    if not as_json:
        sys.stdout.write("\n")
        sys.stdout.flush()
        for logprob in logprobs:
            console.print(_line(logprob), style="dim", highlight=False, soft_wrap=True)
        console.print(summary(finish), style="dim", highlight=False, soft_wrap=True)
        if hint_at_trace:
            console.print(f"tandem trace {request_id}", style="dim", highlight=False, soft_wrap=True)
    return finish


def _line(chosen: generation_pb2.TokenLogprob) -> str:
    """Log probability of a token and of its most likely alternatives."""
    others = "  ".join(f"{other.token_id}: {other.logprob:.3f}" for other in chosen.top)
    return f"token {chosen.token_id}: {chosen.logprob:.3f}" + (f"  (most likely: {others})" if others else "")


def summary(finish: pb.GenerateFinish) -> str:
    """One line: route, token counts, latency, KV bytes transferred, finish reason."""
    route, timings, usage = finish.route, finish.timings, finish.usage
    pair = (
        f"{route.prefill_worker_id} → {route.decode_worker_id}" if route.prefill_worker_id else route.decode_worker_id
    )
    if route.placement:
        pair += f" ({placement_text(route.placement)})"
    parts = [pair, f"{usage.prompt_tokens} + {usage.completion_tokens} tokens"]
    if timings.HasField("time_to_first_token"):
        parts.append(f"TTFT {timings.time_to_first_token.ToNanoseconds() / 1e6:.0f} ms")
    rate = tokens_per_s(finish)
    if rate is not None:
        parts.append(f"{rate:.0f} tokens/s")
    if timings.HasField("kv_transfer_bytes"):
        parts.append(f"{timings.kv_transfer_bytes:,} bytes of KV moved{kv_check_text(timings.kv_check)}")
    if timings.HasField("recomputed_tokens"):
        parts.append(f"{timings.recomputed_tokens} prompt tokens recomputed")
    reason = generation_pb2.FinishReason.Name(finish.reason).removeprefix("FINISH_REASON_").lower()
    return " · ".join([*parts, f"finish: {reason}"])


def tokens_per_s(finish: pb.GenerateFinish) -> float | None:
    """Tokens per second after the first token; None for fewer than two tokens."""
    first, last = finish.timings.first_token_time, finish.timings.last_token_time
    took_s = (last.ToNanoseconds() - first.ToNanoseconds()) / 1e9
    return (finish.usage.completion_tokens - 1) / took_s if took_s > 0 else None


async def _takes_messages(address: str, asked: Asked) -> bool:
    try:
        models = await calls.list_models(address, tls=asked.tls)
    except NotSupported:
        raise StartError(f"{address} is not a Tandem frontend") from None
    if not models:
        raise NoWorkers("no model is served: no worker is alive")
    named = [m for m in models if asked.model in (None, m.name, *m.aliases)]
    return bool(named) and named[0].has_chat_template
