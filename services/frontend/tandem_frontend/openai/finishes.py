"""Why an answer ended, in OpenAI's words."""

from __future__ import annotations

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.api.types.v1 import generation_pb2

REASONS = {
    generation_pb2.FINISH_REASON_STOP: "stop",
    generation_pb2.FINISH_REASON_LENGTH: "length",
}


def finish_reason(finish: pb.GenerateFinish, *, called_tools: bool = False) -> str:
    """`tool_calls` where the model called one and came to its own end."""
    reason = REASONS[finish.reason]
    return "tool_calls" if called_tools and reason == "stop" else reason
