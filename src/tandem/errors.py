"""The errors of Tandem, with their gRPC codes and machine-readable reasons.

    TandemError
    ├── RequestError             the caller must change the request
    │   ├── InvalidRequest       a field is wrong                       INVALID_ARGUMENT
    │   │   ├── ContextExceeded  the prompt fills the model's context   INVALID_ARGUMENT
    │   │   └── RequestTooLarge  the request exceeds the size limit     INVALID_ARGUMENT
    │   ├── ModelNotFound        no worker serves that model            NOT_FOUND
    │   ├── WorkerNotFound       unknown worker or lease                NOT_FOUND
    │   ├── RequestNotFound      unknown or forgotten request           NOT_FOUND
    │   ├── ObjectNotFound       unknown file or batch                  NOT_FOUND
    │   ├── DuplicateWorker      a live worker has that id or address   ALREADY_EXISTS
    │   ├── StaleEpoch           the worker was restarted               FAILED_PRECONDITION
    │   ├── WrongRole            wrong worker role for that call        FAILED_PRECONDITION
    │   ├── RoleChangeRefused    a worker cannot take that role now     FAILED_PRECONDITION
    │   ├── AdapterRefused       an adapter was not (un)loaded          FAILED_PRECONDITION
    │   ├── AdminDisabled        disabled by a setting                  FAILED_PRECONDITION
    │   └── NotSupported         not supported by engine or model       UNIMPLEMENTED
    ├── ServiceError             the cluster is at fault; most can be retried
    │   ├── NoWorkers            no live worker of a needed role        UNAVAILABLE
    │   ├── IncompatibleWorkers  no two live workers are compatible     FAILED_PRECONDITION
    │   ├── LegFailed            a leg failed: leg, worker, phase       UNAVAILABLE
    │   │   └── KvCorrupt        the KV that arrived is not what left   UNAVAILABLE
    │   ├── Draining             shutting down; retry elsewhere         UNAVAILABLE
    │   ├── Overloaded           at capacity; retry later               RESOURCE_EXHAUSTED
    │   │   └── QuotaExceeded    the tenant has used its quota          RESOURCE_EXHAUSTED
    │   ├── DeadlinePassed       the caller's deadline has passed       DEADLINE_EXCEEDED
    │   ├── RequestAborted       the request was aborted                CANCELLED
    │   ├── ParserFailed         the output could not be parsed         INTERNAL
    │   ├── ProfileFailed        no profile was recorded                INTERNAL
    │   └── EngineFailed         the engine died or misbehaved          INTERNAL
    └── StartError               a process cannot start; printed without traceback
        └── ConfigError          invalid setting, names the key; exit status 2

Handlers raise these; only `tandem.rpc.status` converts them to and from gRPC statuses.
"""

from __future__ import annotations

from typing import ClassVar

from tandem.exit_codes import EXIT_CONFIG, EXIT_FAILED


class TandemError(Exception):
    """Base class of all expected errors. `str()` is one sentence that can be shown to a user."""

    code: ClassVar[str] = "INTERNAL"
    """Name of the gRPC status code."""
    reason: ClassVar[str] = "INTERNAL"
    """Name in `tandem.api.types.v1.ErrorReason` without its prefix."""

    def __init__(self, message: str, /, **metadata: str | int | None) -> None:
        """`metadata` may hold any key: an error of another process is raised again with the keys that it had."""
        super().__init__(message)
        self.message = message
        self.metadata: dict[str, str] = {key: str(value) for key, value in metadata.items() if value is not None}

    @property
    def retry_delay_s(self) -> float | None:
        """Seconds after which a retry makes sense; None: unknown."""
        return None


class RequestError(TandemError):
    """The request is at fault; the caller must change it."""

    code = "INVALID_ARGUMENT"
    reason = "INVALID_REQUEST"


class InvalidRequest(RequestError):
    """A field of the request is invalid; `metadata["field"]` names it."""

    def __init__(self, field: str, problem: str, /, **metadata: str | int | None) -> None:
        super().__init__(f"{field}: {problem}", **{**metadata, "field": field})
        self.field = field

    def renamed(self, field: str) -> InvalidRequest:
        """The same error for an API in which the field has another name."""
        others = {key: value for key, value in self.metadata.items() if key != "field"}
        return type(self)(field, self.message.removeprefix(f"{self.field}: "), **others)


class ContextExceeded(InvalidRequest):
    """The prompt fills the model's context; `metadata["limit"]` is the context length in tokens."""

    reason = "CONTEXT_LENGTH_EXCEEDED"


class RequestTooLarge(InvalidRequest):
    """The request exceeds the size limit; `metadata["limit"]` is the limit in bytes."""

    reason = "REQUEST_TOO_LARGE"


class ModelNotFound(RequestError):
    """No live worker serves the model."""

    code = "NOT_FOUND"
    reason = "MODEL_NOT_FOUND"


class WorkerNotFound(RequestError):
    """The worker or lease is unknown to the registry."""

    code = "NOT_FOUND"
    reason = "WORKER_NOT_FOUND"


class RequestNotFound(RequestError):
    """The request is unknown to the frontend, or its record has been evicted."""

    code = "NOT_FOUND"
    reason = "REQUEST_NOT_FOUND"


class ObjectNotFound(RequestError):
    """The tenant has no file or batch of that id; `metadata["field"]` names the parameter that holds it."""

    code = "NOT_FOUND"
    reason = "OBJECT_NOT_FOUND"


class DuplicateWorker(RequestError):
    """A live worker already has that id or address."""

    code = "ALREADY_EXISTS"
    reason = "DUPLICATE_WORKER"


class StaleEpoch(RequestError):
    """The call carries the epoch of another start of this worker."""

    code = "FAILED_PRECONDITION"
    reason = "STALE_EPOCH"


class RevisionAhead(RequestError):
    """The watcher holds a later revision than this registry, received from a replica that is ahead."""

    code = "FAILED_PRECONDITION"
    reason = "REVISION_AHEAD"


class WrongRole(RequestError):
    """The call requires another worker role."""

    code = "FAILED_PRECONDITION"
    reason = "WRONG_ROLE"


class RoleChangeRefused(RequestError):
    """A worker cannot take a role, or must not now; nothing has changed. Metadata: worker, role."""

    code = "FAILED_PRECONDITION"
    reason = "ROLE_CHANGE_REFUSED"


class AdapterRefused(RequestError):
    """An adapter was not loaded or unloaded. Metadata: adapter, worker (the first at fault), workers."""

    code = "FAILED_PRECONDITION"
    reason = "ADAPTER_REFUSED"


class AdminDisabled(RequestError):
    """The call is disabled; `metadata["setting"]` names the setting that enables it."""

    code = "FAILED_PRECONDITION"
    reason = "ADMIN_DISABLED"


class NotSupported(RequestError):
    """The engine or the model does not support the request."""

    code = "UNIMPLEMENTED"
    reason = "NOT_SUPPORTED"


class ServiceError(TandemError):
    """The cluster is at fault, not the request."""

    code = "UNAVAILABLE"
    reason = "UNAVAILABLE"


class NoWorkers(ServiceError):
    """No live worker of a required role. Metadata: `role`; `waited_s` if the request has waited for one; `model_digest`
    if there are only workers with other weights than those that a call of several inputs began with.
    """

    reason = "NO_WORKERS"

    @property
    def retry_delay_s(self) -> float | None:
        """1 s: a worker that is restarted usually listens again by then."""
        return 1.0


class IncompatibleWorkers(ServiceError):
    """Both roles are live, but no two workers can exchange KV, or none implements this frontend's leg contract;
    `metadata["field"]` names the field that differs.
    """

    code = "FAILED_PRECONDITION"
    reason = "INCOMPATIBLE_WORKERS"


class LegFailed(ServiceError):
    """A leg of the attempt failed. Metadata: leg, worker, phase, attempt, room; `cause` if the other leg failed it."""

    PEER_ABORTED = "peer_aborted"
    """Value of `cause`: the other leg was aborted at its worker, whose engine notified this one's."""

    reason = "LEG_FAILED"


class KvCorrupt(LegFailed):
    """The KV that arrived at the decode engine is not what the prefill engine sent. Nothing was generated from it."""

    reason = "KV_CORRUPT"


class Draining(ServiceError):
    """The process is draining and admits no new requests."""

    reason = "DRAINING"

    @property
    def retry_delay_s(self) -> float | None:
        """0.1 s: another replica can take the request immediately."""
        return 0.1


class Overloaded(ServiceError):
    """A capacity limit was reached; retry after `retry_delay_s`."""

    code = "RESOURCE_EXHAUSTED"
    reason = "OVERLOADED"

    def __init__(self, message: str, /, *, retry_delay_s: float = 1.0, **metadata: str | int | None) -> None:
        super().__init__(message, **metadata)
        self._retry_delay_s = retry_delay_s

    @property
    def retry_delay_s(self) -> float | None:
        """As given by the component that rejected the request."""
        return self._retry_delay_s


class QuotaExceeded(Overloaded):
    """The tenant has used its quota, which holds at all frontends; `metadata["limit"]` names its field."""

    reason = "QUOTA_EXCEEDED"


class DeadlinePassed(ServiceError):
    """The caller's deadline passed before the request finished, or would pass before it could."""

    code = "DEADLINE_EXCEEDED"
    reason = "DEADLINE_EXCEEDED"


class RequestAborted(ServiceError):
    """The request was aborted, or its caller cancelled it."""

    code = "CANCELLED"
    reason = "ABORTED"


class EngineFailed(ServiceError):
    """The engine died or violated its contract."""

    code = "INTERNAL"
    reason = "ENGINE_FAILED"


class ParserFailed(ServiceError):
    """The model's output (tool calls, reasoning) could not be parsed, or not within the bounds of one stream.

    Not UNAVAILABLE: another frontend would fail on the same output, so nothing repeats the request there.
    """

    code = "INTERNAL"
    reason = "PARSER_FAILED"


class ProfileFailed(ServiceError):
    """A profile could not be recorded, or is too large to send."""

    code = "INTERNAL"
    reason = "PROFILE_FAILED"


class StartError(TandemError):
    """A process cannot start, for a reason its operator can fix."""

    reason = "START_FAILED"
    exit_status: ClassVar[int] = EXIT_FAILED


class ConfigError(StartError):
    """A setting is unknown, malformed or out of range; `metadata["key"]` names it."""

    reason = "CONFIG_INVALID"
    exit_status = EXIT_CONFIG

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(f"{key}: {problem}", key=key)
        self.key = key
