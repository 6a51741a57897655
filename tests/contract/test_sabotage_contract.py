"""The negative control of parity: a decode engine to which nothing is moved emits other tokens.

Without this, equal tokens could also mean that decode computed the prompt itself.
"""

from __future__ import annotations

import pytest

from tandem.domain.generation import Bootstrap
from tests.contract.support.fleet import Fleet, prompt_of, request_of

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(180)]


async def test_without_transfer_the_tokens_differ(fleet: Fleet) -> None:
    reference = await fleet.reference()
    decode = await fleet.sabotaged_decode()
    # SGLang skips the hand-over only for this host name of its own (FAKE_BOOTSTRAP_HOST), whatever the backend.
    no_peer = Bootstrap(host="2.2.2.2", port=1, room=1)
    equal = 0
    lengths = (17, 64, 128, 300, 600)
    for length in lengths:
        request = request_of(prompt_of(length, decode.capabilities.vocabulary_size), bootstrap=no_peer)
        finished = await decode.generate(request).all()
        equal += finished.token_ids == reference[length].token_ids
        assert finished.finish.timings is not None
        assert not finished.finish.timings.kv_transfer_bytes
    assert equal == 0, f"{equal} of {len(lengths)} prompts were answered right although no KV moved"
    assert decode.capabilities.transfer_backend == "fake"
