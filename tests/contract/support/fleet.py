"""Engine processes of one adapter, one set at a time: SGLang takes seconds to start and a gigabyte to hold.

Owns the order "aggregated, then the pair, then the sabotaged decode engine": asking for another set stops the present
one. Also owns the reference, the aggregated engine's tokens for all prompts of the parity tests.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tandem.domain.generation import Bootstrap, EngineRequest, Guided, Sampling, Stopping, TokenLogprob
from tandem.domain.worker import WorkerRole
from tandem.engine.settings import AdapterSettings, EngineSettings
from tandem.testing.adapters import MODULES
from tandem.testing.eventually import assert_eventually
from tests.contract.support.engine_process import EngineProcess, Generation, Result

PROMPT_LENGTHS = (1, 2, 3, 5, 7, 15, 16, 17, 31, 32, 33, 48, 64, 65, 100, 127, 128, 129, 200, 256, 300, 400, 511, 600)
CONCURRENT = 8
REFERENCE_TOKENS = 16
FIRST_ORDINARY_TOKEN_ID = 10
ADAPTERS = AdapterSettings(rank_max=8, per_batch_max=4, modules=MODULES)
GREEDY = Sampling(temperature=0.0)
DRAWN = (
    Sampling(temperature=1.0, seed=1),
    Sampling(temperature=1.0, seed=-(2**63)),
    Sampling(temperature=0.7, seed=2**63 - 1, top_p=0.9, top_k=50),
    Sampling(temperature=1.3, seed=7, min_p=0.02, repetition_penalty=1.2, presence_penalty=0.5, frequency_penalty=0.5),
)
"""Draws that repeat."""
DRAWN_LENGTH = 40
_numbers = itertools.count(1)


def prompt_of(length: int, vocabulary_size: int, seed: int = 0) -> tuple[int, ...]:
    """A repeatable prompt of ordinary tokens."""
    draw = random.Random(f"{length} {seed}")
    return tuple(draw.randrange(FIRST_ORDINARY_TOKEN_ID, vocabulary_size) for _ in range(length))


def request_of(
    token_ids: tuple[int, ...],
    max_tokens: int = REFERENCE_TOKENS,
    *,
    bootstrap: Bootstrap | None = None,
    top_logprobs: int | None = None,
    prompt_logprobs: bool = False,
    ignore_eos: bool = True,
    sampling: Sampling = GREEDY,
    guided: Guided | None = None,
    **stopping: Any,
) -> EngineRequest:
    """A request under a fresh id, greedy by default."""
    return EngineRequest(
        request_id=f"contract-{next(_numbers):06d}",
        token_ids=token_ids,
        sampling=sampling,
        guided=guided,
        stopping=Stopping(max_tokens=max_tokens, ignore_eos=ignore_eos, **stopping),
        top_logprobs=top_logprobs,
        prompt_logprobs=prompt_logprobs,
        bootstrap=bootstrap,
    )


async def assert_idle(engine: EngineProcess, within_s: float = 5.0) -> None:
    """Nothing runs, waits or moves, and no KV is held: flushing the prefix cache leaves what there was at the start."""

    async def look() -> dict[str, Any]:
        flushed = await engine.flush_cache()
        load = await engine.load()
        return {
            "flushed": flushed,
            "busy": [load.running_requests, load.waiting_requests, load.transferring_requests],
            "leaked_tokens": (load.kv_used_tokens or 0) - (engine.idle_load.kv_used_tokens or 0),
        }

    def idle(seen: dict[str, Any]) -> bool:
        return seen["flushed"] and not any(seen["busy"]) and seen["leaked_tokens"] == 0

    await assert_eventually(look, idle, within_s=within_s, every_s=0.1, what="idle engine")


@dataclass
class Pair:
    """A prefill and a decode engine that can meet."""

    prefill: EngineProcess
    decode: EngineProcess

    def room(self) -> Bootstrap:
        """A fresh room at the prefill engine."""
        address = self.prefill.bootstrap
        assert address is not None
        return Bootstrap(host=address.host, port=address.port, room=2**62 + next(_numbers))

    def begin(self, token_ids: tuple[int, ...], max_tokens: int = REFERENCE_TOKENS, **more: Any) -> list[Generation]:
        """Start both legs of one attempt: prefill, decode."""
        room = self.room()
        return [
            engine.generate(request_of(token_ids, max_tokens, bootstrap=room, **more))
            for engine in (self.prefill, self.decode)
        ]

    async def run(self, token_ids: tuple[int, ...], max_tokens: int = REFERENCE_TOKENS, **more: Any) -> list[Result]:
        """Run both legs of one attempt to their ends: prefill, decode."""
        return await asyncio.gather(*(leg.all() for leg in self.begin(token_ids, max_tokens, **more)))

    async def assert_idle(self) -> None:
        """Both engines hold nothing."""
        await assert_idle(self.prefill)
        await assert_idle(self.decode)


class Fleet:
    """The engines of one adapter."""

    def __init__(self, name: str, model_path: Path, log: Path, extra: dict[str, Any]) -> None:
        self.name = name
        self._model_path = model_path
        self._log = log
        self._extra = extra
        self._running: tuple[str, list[EngineProcess]] = ("", [])
        self._reference: dict[int, Result] | None = None
        self._drawn: list[list[int]] | None = None
        self._rated: tuple[TokenLogprob, ...] | None = None

    async def aggregated(self) -> EngineProcess:
        """One engine that does everything."""
        return (await self._use("aggregated", (WorkerRole.AGGREGATED, "nixl")))[0]

    async def pair(self) -> Pair:
        """A prefill and a decode engine."""
        return Pair(*await self._use("pair", (WorkerRole.PREFILL, "nixl"), (WorkerRole.DECODE, "nixl")))

    async def sabotaged_decode(self) -> EngineProcess:
        """A decode engine whose transfer moves nothing."""
        return (await self._use("sabotaged", (WorkerRole.DECODE, "fake")))[0]

    async def reference(self) -> dict[int, Result]:
        """The aggregated engine's answer to the prompt of each length, one at a time, with log probabilities."""
        if self._reference is None:
            engine = await self.aggregated()
            size = engine.capabilities.vocabulary_size
            self._reference = {
                length: await engine.generate(request_of(prompt_of(length, size), top_logprobs=2)).all()
                for length in PROMPT_LENGTHS
            }
        return self._reference

    async def drawn(self) -> list[list[int]]:
        """The aggregated engine's tokens for each of DRAWN, one at a time."""
        if self._drawn is None:
            engine = await self.aggregated()
            prompt = prompt_of(DRAWN_LENGTH, engine.capabilities.vocabulary_size)
            requests = [request_of(prompt, sampling=sampling) for sampling in DRAWN]
            self._drawn = [(await engine.generate(request).all()).token_ids for request in requests]
        return self._drawn

    async def rated(self) -> tuple[TokenLogprob, ...]:
        """The aggregated engine's log probabilities of the longest prompt's tokens."""
        if self._rated is None:
            engine = await self.aggregated()
            prompt = prompt_of(PROMPT_LENGTHS[-1], engine.capabilities.vocabulary_size)
            result = await engine.generate(request_of(prompt, 1, top_logprobs=1, prompt_logprobs=True)).all()
            self._rated = result.finish.prompt_logprobs
        return self._rated

    async def caching(self, role: WorkerRole, kv_capacity_tokens: int, extra: dict[str, Any]) -> EngineProcess:
        """One engine whose prefix cache is small."""
        plain = self._settings(role, "nixl")
        settings = dataclasses.replace(plain, kv_capacity_tokens=kv_capacity_tokens, extra=plain.extra | extra)
        return (await self._use_settings("caching", [settings]))[0]

    async def caching_pair(self, page_size_tokens: int) -> Pair:
        """A pair whose decode engine has a prefix cache. Both load adapters."""
        page, cache = {
            "simulated": ("page_size_tokens", "decode_prefix_cache"),
            "sglang": ("page_size", "disaggregation_decode_enable_radix_cache"),
        }[self.name]
        prefill, decode = (self._settings(role, "nixl") for role in (WorkerRole.PREFILL, WorkerRole.DECODE))
        wanted = [
            dataclasses.replace(prefill, extra=prefill.extra | {page: page_size_tokens}, adapters=ADAPTERS),
            dataclasses.replace(decode, extra=decode.extra | {page: page_size_tokens, cache: True}, adapters=ADAPTERS),
        ]
        return Pair(*await self._use_settings("caching pair", wanted))

    async def switching_pair(self, page_size_tokens: int) -> Pair:
        """A pair that is used in no other test, with pages of a size for which KV events are reported."""
        page = {"simulated": "page_size_tokens", "sglang": "page_size"}[self.name]
        pair = (self._settings(role, "nixl") for role in (WorkerRole.PREFILL, WorkerRole.DECODE))
        wanted = [dataclasses.replace(settings, extra=settings.extra | {page: page_size_tokens}) for settings in pair]
        return Pair(*await self._use_settings("switching pair", wanted))

    async def unstarted(self) -> EngineProcess:
        """A process with an engine that was made and never started; the caller closes it."""
        return await EngineProcess.spawn(self.name, self._settings(WorkerRole.AGGREGATED, "nixl"), self._log)

    async def close(self) -> None:
        """Stop whatever runs; the next one asked for starts afresh."""
        _, engines = self._running
        self._running = ("", [])
        await asyncio.gather(*(engine.close() for engine in engines))

    async def _use(self, key: str, *kinds: tuple[WorkerRole, str]) -> list[EngineProcess]:
        return await self._use_settings(key, [self._settings(*kind) for kind in kinds])

    async def _use_settings(self, key: str, wanted: Sequence[EngineSettings]) -> list[EngineProcess]:
        if self._running[0] != key:
            await self.close()
            engines = [await EngineProcess.spawn(self.name, settings, self._log) for settings in wanted]
            self._running = (key, engines)
            try:
                await asyncio.gather(*(engine.start() for engine in engines))
            except BaseException:
                await self.close()
                raise
        return self._running[1]

    def _settings(self, role: WorkerRole, transfer_backend: str) -> EngineSettings:
        return EngineSettings(
            role=role,
            model_path=self._model_path,
            model_name="contract",
            device="cpu",
            dtype="float32",
            transfer_backend=transfer_backend,
            extra=self._extra,
        )
