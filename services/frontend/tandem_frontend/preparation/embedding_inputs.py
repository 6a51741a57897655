"""Validation of requests for embeddings, and their tokens. An error names the field as the contract calls it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.domain.limits import REQUEST_ID_CHARS_MAX
from tandem.domain.worker import Capabilities
from tandem.errors import InvalidRequest
from tandem.rpc.convert import present
from tandem_frontend.preparation.tokenizer import Tokenizer
from tandem_frontend.preparation.validation import (
    PRIORITY_MAX,
    REQUEST_ID,
    check_prompt_ids,
    check_text,
    check_token_count,
)

INPUTS_MAX = 2_048
"""OpenAI's own limit."""
NUMBERS_MAX = 4 * 2**20
"""Numbers in the embeddings of one call: as JSON they fill 55 MB, and an edge sends at most 64."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedInput:
    """One input, tokenised."""

    field: str
    """The field that contained it."""
    token_ids: Sequence[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedEmbed:
    """A valid, tokenised request."""

    inputs: Sequence[CheckedInput]
    dimensions: int | None
    """None: all that the model has."""
    priority: int

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all inputs."""
        return sum(len(each.token_ids) for each in self.inputs)


def input_id(request_id: str, number: int) -> str:
    """The label of one input of a call, counted from 0; the first one has that of the call."""
    return request_id if not number else f"{request_id[: REQUEST_ID_CHARS_MAX - 5]}-{number}"


async def checked_embed(request: pb.EmbedRequest, tokenizer: Tokenizer, about: Capabilities | None) -> CheckedEmbed:
    """Check a request and tokenise its inputs, with pauses for the event loop.

    Args:
        request: as the client sent it.
        tokenizer: of its model.
        about: what a worker of the model says of its embeddings; None: there is no worker, and routing will say so.

    Raises:
        InvalidRequest: names the first invalid field.
    """
    if request.HasField("request_id") and not REQUEST_ID.fullmatch(request.request_id):
        raise InvalidRequest(
            "request_id", f"must be 1 to {REQUEST_ID_CHARS_MAX} characters of a-z, A-Z, 0-9, '.', '_', '-'"
        )
    if abs(request.priority) > PRIORITY_MAX:
        raise InvalidRequest("priority", f"must be -{PRIORITY_MAX} to {PRIORITY_MAX}, not {request.priority}")
    count, dimensions = len(request.inputs), present(request, "dimensions", request.dimensions)
    if not 1 <= count <= INPUTS_MAX:
        raise InvalidRequest("inputs", f"must be 1 to {INPUTS_MAX} inputs, not {count}", limit=INPUTS_MAX)
    if about is not None:
        _check_dimensions(dimensions, about)
        size = dimensions or about.embedding_size
        if count * size > NUMBERS_MAX:
            most = NUMBERS_MAX // size
            raise InvalidRequest("inputs", f"must be at most {most} inputs of {size} numbers each", limit=most)
    inputs: list[CheckedInput] = []
    for number, given in enumerate(request.inputs):
        # Many short inputs are as much work as a long one: the event loop runs other requests between them.
        if number:
            await asyncio.sleep(0)
        inputs.append(await _checked_input(f"inputs[{number}]", given, tokenizer))
    return CheckedEmbed(inputs=inputs, dimensions=dimensions, priority=request.priority)


def _check_dimensions(dimensions: int | None, about: Capabilities) -> None:
    if dimensions is None:
        return
    if not about.is_matryoshka:
        raise InvalidRequest(
            "dimensions",
            f"must be absent: model {about.model} was not trained for embeddings of fewer than "
            f"{about.embedding_size} numbers (matryoshka)",
        )
    if about.embedding_sizes and dimensions not in about.embedding_sizes:
        sizes = ", ".join(map(str, about.embedding_sizes))
        raise InvalidRequest("dimensions", f"must be one of {sizes}, not {dimensions}")
    if not 1 <= dimensions <= about.embedding_size:
        raise InvalidRequest("dimensions", f"must be 1 to {about.embedding_size}, not {dimensions}")


async def _checked_input(field: str, given: pb.EmbedInput, tokenizer: Tokenizer) -> CheckedInput:
    kind = given.WhichOneof("input")
    if kind is None:
        raise InvalidRequest(field, "one of text and token_ids must be given")
    name = f"{field}.{kind}"
    token_ids: Sequence[int]
    if kind == "text":
        if not given.text:
            raise InvalidRequest(name, "must not be empty")
        check_text(name, given.text, tokenizer)
        token_ids = await tokenizer.encode(given.text, add_special_tokens=True, field=name)
    else:
        token_ids = given.token_ids.ids
        check_token_count(name, len(token_ids), tokenizer)
    if not token_ids:
        raise InvalidRequest(name, "must not be empty")
    if kind == "token_ids" or not tokenizer.fits_vocabulary:
        await check_prompt_ids(name, token_ids, tokenizer.vocabulary_size)
    check_token_count(name, len(token_ids), tokenizer)
    return CheckedInput(field=name, token_ids=token_ids)
