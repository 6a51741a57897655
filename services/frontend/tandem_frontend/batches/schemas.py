"""The body of POST /v1/batches. A parameter is honoured, or refused by name."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tandem_frontend.openai.common_params import Int64, Schema

METADATA_MAX, METADATA_KEY_CHARS_MAX, METADATA_CHARS_MAX = 16, 64, 512
EXPIRES_MIN_S, EXPIRES_MAX_S = 3_600, 2_592_000
"""As in OpenAI's API: an hour to thirty days."""


class ExpiresAfter(Schema):
    """When a file is deleted."""

    anchor: Literal["created_at"]
    seconds: Annotated[Int64, Field(ge=EXPIRES_MIN_S, le=EXPIRES_MAX_S)]


class CreateBatchRequest(Schema):
    """A batch that a client creates."""

    input_file_id: str
    endpoint: Literal["/v1/chat/completions", "/v1/completions", "/v1/responses"]
    completion_window: Literal["24h"]
    metadata: (
        Annotated[
            dict[
                Annotated[str, Field(max_length=METADATA_KEY_CHARS_MAX)],
                Annotated[str, Field(max_length=METADATA_CHARS_MAX)],
            ],
            Field(max_length=METADATA_MAX),
        ]
        | None
    ) = None
    output_expires_after: ExpiresAfter | None = None
