"""Names of spans and of their attributes, defined only here. docs/reference/tracing.md explains them.

`gen_ai.*` and `error.type` follow OpenTelemetry's conventions; everything else is `tandem.*`.
"""

from __future__ import annotations

# Spans of the frontend. The root span of a request is named after its operation.
TOKENISE, VALIDATE, ADMIT, WAIT, ROUTE = "tokenise", "validate", "admit", "wait", "route"
ATTEMPT, DISPATCH, AWAIT, FINISH = "attempt", "dispatch", "await first token", "finish"
# Spans of a worker: the leg, and its steps in the engine.
LEG = {"prefill": "prefill leg", "decode": "decode leg", "aggregated": "aggregated leg"}
SUBMIT = "submit"
BOOTSTRAP, QUEUE, PREFILL, TRANSFER = "bootstrap", "queue", "prefill", "transfer"
PREALLOCATE, WAIT_FOR_KV, FIRST_TOKEN, STREAM = "pre-allocate", "wait for KV", "first token", "stream"

IN_ENGINE = "in the engine"
"""Event on the first token's span: the engine's scheduler had the token."""

OPERATION, MODEL = "gen_ai.operation.name", "gen_ai.request.model"
INPUT_TOKENS, OUTPUT_TOKENS = "gen_ai.usage.input_tokens", "gen_ai.usage.output_tokens"
FINISH_REASONS, MAX_TOKENS = "gen_ai.response.finish_reasons", "gen_ai.request.max_tokens"
ERROR_TYPE = "error.type"
CACHED_TOKENS = "tandem.cached_tokens"
REQUEST_ID = "tandem.request_id"
ATTEMPT_NUMBER = "tandem.attempt"
ROOM = "tandem.room"
ROLE, WORKER, EPOCH = "tandem.role", "tandem.worker", "tandem.worker_epoch"
PREFILL_WORKER, PREFILL_EPOCH = "tandem.prefill_worker", "tandem.prefill_epoch"
DECODE_WORKER, DECODE_EPOCH = "tandem.decode_worker", "tandem.decode_epoch"
CANDIDATES_COUNT, CANDIDATES, WHY = "tandem.candidates_count", "tandem.candidates", "tandem.why"
POLICY, EXPECTED_CACHED_TOKENS = "tandem.policy", "tandem.expected_cached_tokens"
PLACEMENT = "tandem.placement"
TENANT, OUTCOME = "tandem.tenant", "tandem.outcome"
TTFT_S = "tandem.ttft_s"
TOKENS_BEFORE = "tandem.tokens_before"
FAILED_LEG, FAILED_WORKER, PHASE = "tandem.failed_leg", "tandem.failed_worker", "tandem.phase"
KV_BYTES, RECOMPUTED_TOKENS = "tandem.kv_transfer_bytes", "tandem.recomputed_tokens"
KV_CHECK = "tandem.kv_check"
PROMPT = "tandem.prompt"
CONTINUES = "tandem.continues"
"""Attribute of the link to the failed attempt; true: this attempt continues its stream, false: it starts over."""
