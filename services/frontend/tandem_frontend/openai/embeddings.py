"""POST /v1/embeddings: texts or token ids, one or several, to vectors, as numbers or as base64 of float32."""

from __future__ import annotations

import asyncio
import base64
import re
import struct
from collections.abc import Sequence
from typing import Any

from google.api import httpbody_pb2

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.errors import InvalidRequest
from tandem_frontend.call_context import Caller
from tandem_frontend.embedding import Embeddings
from tandem_frontend.openai.field_names import renaming
from tandem_frontend.openai.response import JSON, to_json
from tandem_frontend.openai.schemas import EmbeddingsRequest
from tandem_frontend.preparation.embedding_inputs import INPUTS_MAX
from tandem_frontend.response.writers import ClientCall

_INPUT = re.compile(r"inputs(\[\d+\])?.*")


async def handle(
    body: EmbeddingsRequest, embeddings: Embeddings, caller: Caller, call: ClientCall
) -> httpbody_pb2.HttpBody:
    """Run the request, and return the body of its response.

    Raises:
        TandemError: its `field` is the client's parameter.
    """
    is_list = isinstance(body.input, list) and not (body.input and isinstance(body.input[0], int))
    with renaming(lambda field: _parameter(field, is_list=is_list)):
        found = await embeddings.embed(_request(body, is_list=is_list), caller, call)
    return httpbody_pb2.HttpBody(content_type=JSON, data=await _whole(found, body.encoding_format or "float"))


def _request(body: EmbeddingsRequest, *, is_list: bool) -> pb.EmbedRequest:
    given: list[Any] = list(body.input) if is_list else [body.input]
    if len(given) > INPUTS_MAX:
        # Before a message is made of each.
        raise InvalidRequest("input", f"must be 1 to {INPUTS_MAX} inputs, not {len(given)}", limit=INPUTS_MAX)
    request = pb.EmbedRequest(model=body.model, dimensions=body.dimensions, priority=body.priority)
    for each in given:
        if isinstance(each, str):
            request.inputs.add(text=each)
        else:
            request.inputs.add(token_ids=pb.TokenIds(ids=each))
    return request


def _parameter(field: str, *, is_list: bool) -> str:
    """The client's name of a field of the contract."""
    found = _INPUT.fullmatch(field)
    if found is None:
        return field
    return f"input{found.group(1) or ''}" if is_list else "input"


async def _whole(found: pb.EmbedResponse, encoding: str) -> bytes:
    """The body, made in parts with pauses for the event loop: a call may have millions of numbers."""
    parts: list[bytes] = []
    for index, embedding in enumerate(found.embeddings):
        if index:
            await asyncio.sleep(0)
        values = _as_base64(embedding.values) if encoding == "base64" else _as_numbers(embedding.values)
        parts.append(b'{"object":"embedding","index":%d,"embedding":%s}' % (index, values))
    tokens = found.usage.prompt_tokens
    tail = {"model": found.model, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}}
    return b'{"object":"list","data":[' + b",".join(parts) + b"]," + to_json(tail)[1:]


def _as_numbers(values: Sequence[float]) -> bytes:
    """Nine digits hold every float32 exactly."""
    return b"[" + ",".join([format(value, ".9g") for value in values]).encode() + b"]"


def _as_base64(values: Sequence[float]) -> bytes:
    return b'"' + base64.b64encode(struct.pack(f"<{len(values)}f", *values)) + b'"'
