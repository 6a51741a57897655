"""The errors of Tandem, the one place where a failure gets its gRPC code and its machine-readable reason.

    TandemError
    ├── RequestError             the caller can repair it
    │   ├── InvalidRequest       a field is wrong                       INVALID_ARGUMENT
    │   │   ├── ContextExceeded  the prompt leaves no room to answer    INVALID_ARGUMENT
    │   │   └── RequestTooLarge  more bytes than any request needs      INVALID_ARGUMENT
    │   ├── ModelNotFound        nobody serves that model               NOT_FOUND
    │   ├── WorkerNotFound       no such worker or lease                NOT_FOUND
    │   ├── RequestNotFound      no such request, or no longer          NOT_FOUND
    │   ├── DuplicateWorker      a live worker holds that id            ALREADY_EXISTS
    │   ├── StaleEpoch           the worker was restarted since         FAILED_PRECONDITION
    │   ├── WrongRole            a worker cannot serve that call        FAILED_PRECONDITION
    │   ├── AdminDisabled        a setting does not allow it            FAILED_PRECONDITION
    │   └── NotSupported         this engine or model cannot            UNIMPLEMENTED
    ├── ServiceError             the cluster must repair it; most can be tried again
    │   ├── NoWorkers            no live worker of a needed role        UNAVAILABLE
    │   ├── IncompatibleWorkers  live workers do not make a pair        FAILED_PRECONDITION
    │   ├── LegFailed            a leg broke: says leg, worker, phase   UNAVAILABLE
    │   ├── Draining             going away, try another                UNAVAILABLE
    │   ├── Overloaded           try again after a while                RESOURCE_EXHAUSTED
    │   ├── DeadlinePassed       the caller's time is over              DEADLINE_EXCEEDED
    │   ├── RequestAborted       somebody asked for the abort           CANCELLED
    │   ├── ParserFailed         the output could not be parsed         UNAVAILABLE
    │   ├── ProfileFailed        there is no profile to be sent         INTERNAL
    │   └── EngineFailed         the engine broke its contract          INTERNAL
    └── StartError               a process cannot start; one sentence, no traceback
        └── ConfigError          names the key; exit status 2

Handlers raise these; `tandem.rpc.status` alone turns them into a status on the wire and back.
"""

from __future__ import annotations

from typing import ClassVar

from tandem.exit_codes import EXIT_CONFIG, EXIT_FAILED


class TandemError(Exception):
    """Root of all errors Tandem raises on purpose. `str()` is one sentence that can be shown to a user."""

    code: ClassVar[str] = "INTERNAL"
    """Name of the gRPC status code."""
    reason: ClassVar[str] = "INTERNAL"
    """Name in `tandem.api.types.v1.ErrorReason` without its prefix."""

    def __init__(self, message: str, /, **metadata: str | int | None) -> None:
        """`metadata` may hold any key: another process's error is told again with the keys that came with it."""
        super().__init__(message)
        self.message = message
        self.metadata: dict[str, str] = {key: str(value) for key, value in metadata.items() if value is not None}

    @property
    def retry_delay_s(self) -> float | None:
        """Seconds after which another try makes sense; None when nothing is known."""
        return None


class RequestError(TandemError):
    """The caller can repair it."""

    code = "INVALID_ARGUMENT"
    reason = "INVALID_REQUEST"


class InvalidRequest(RequestError):
    """A field of the request is wrong; `metadata["field"]` names it."""

    def __init__(self, field: str, problem: str, /, **metadata: str | int | None) -> None:
        super().__init__(f"{field}: {problem}", **{**metadata, "field": field})
        self.field = field

    def renamed(self, field: str) -> InvalidRequest:
        """The same refusal where the caller knows the field by another name."""
        others = {key: value for key, value in self.metadata.items() if key != "field"}
        return type(self)(field, self.message.removeprefix(f"{self.field}: "), **others)


class ContextExceeded(InvalidRequest):
    """The prompt leaves no room in the model's context; `metadata["limit"]` is the context in tokens."""

    reason = "CONTEXT_LENGTH_EXCEEDED"


class RequestTooLarge(InvalidRequest):
    """The request has more bytes than any that can be served; `metadata["limit"]` says how many it may have."""

    reason = "REQUEST_TOO_LARGE"


class ModelNotFound(RequestError):
    """No live worker serves the model."""

    code = "NOT_FOUND"
    reason = "MODEL_NOT_FOUND"


class WorkerNotFound(RequestError):
    """The registry knows no such worker or lease."""

    code = "NOT_FOUND"
    reason = "WORKER_NOT_FOUND"


class RequestNotFound(RequestError):
    """The frontend knows no request of that id, or no longer."""

    code = "NOT_FOUND"
    reason = "REQUEST_NOT_FOUND"


class DuplicateWorker(RequestError):
    """A live worker already holds that id or address."""

    code = "ALREADY_EXISTS"
    reason = "DUPLICATE_WORKER"


class StaleEpoch(RequestError):
    """The call was meant for another start of this worker."""

    code = "FAILED_PRECONDITION"
    reason = "STALE_EPOCH"


class RevisionAhead(RequestError):
    """The watcher knows a later revision than this registry: it came here from a replica that is ahead."""

    code = "FAILED_PRECONDITION"
    reason = "REVISION_AHEAD"


class WrongRole(RequestError):
    """This worker does not play the role the call needs."""

    code = "FAILED_PRECONDITION"
    reason = "WRONG_ROLE"


class AdminDisabled(RequestError):
    """The process was not started with the setting that allows this; `metadata["setting"]` names it."""

    code = "FAILED_PRECONDITION"
    reason = "ADMIN_DISABLED"


class NotSupported(RequestError):
    """The engine or the model cannot do what was asked."""

    code = "UNIMPLEMENTED"
    reason = "NOT_SUPPORTED"


class ServiceError(TandemError):
    """The cluster must repair it."""

    code = "UNAVAILABLE"
    reason = "UNAVAILABLE"


class NoWorkers(ServiceError):
    """No live worker of a role the request needs."""

    reason = "NO_WORKERS"

    @property
    def retry_delay_s(self) -> float | None:
        """Long enough for a worker to start listening again after a restart of its process group."""
        return 1.0


class IncompatibleWorkers(ServiceError):
    """Both roles are live, but no two workers can exchange KV, or none speaks this frontend's leg contract;
    `metadata["field"]` names what differs.
    """

    code = "FAILED_PRECONDITION"
    reason = "INCOMPATIBLE_WORKERS"


class LegFailed(ServiceError):
    """A leg of the attempt broke. Metadata: leg, worker, phase, attempt, room; `cause` where another leg broke it."""

    PEER_ABORTED = "peer_aborted"
    """Value of `cause`: the other leg was aborted at its worker, and its engine has notified this one's."""

    reason = "LEG_FAILED"


class Draining(ServiceError):
    """The process is going away and admits nothing new."""

    reason = "DRAINING"

    @property
    def retry_delay_s(self) -> float | None:
        """Another replica can be tried at once."""
        return 0.1


class Overloaded(ServiceError):
    """A bound was reached; try again after `retry_delay_s`."""

    code = "RESOURCE_EXHAUSTED"
    reason = "OVERLOADED"

    def __init__(self, message: str, /, *, retry_delay_s: float = 1.0, **metadata: str | int | None) -> None:
        super().__init__(message, **metadata)
        self._retry_delay_s = retry_delay_s

    @property
    def retry_delay_s(self) -> float | None:
        """As given by whoever refused."""
        return self._retry_delay_s


class DeadlinePassed(ServiceError):
    """The caller's deadline passed before the work was done."""

    code = "DEADLINE_EXCEEDED"
    reason = "DEADLINE_EXCEEDED"


class RequestAborted(ServiceError):
    """The request was ended by an abort or by its caller's leaving."""

    code = "CANCELLED"
    reason = "ABORTED"


class EngineFailed(ServiceError):
    """The engine died or answered in a way its contract excludes."""

    code = "INTERNAL"
    reason = "ENGINE_FAILED"


class ParserFailed(ServiceError):
    """The process that parses tool calls and reasoning died, or its parser failed on the model's output."""

    reason = "PARSER_FAILED"


class ProfileFailed(ServiceError):
    """A profile was not recorded, or is too large to be sent."""

    code = "INTERNAL"
    reason = "PROFILE_FAILED"


class StartError(TandemError):
    """A process cannot start, for a reason its operator can repair."""

    reason = "START_FAILED"
    exit_status: ClassVar[int] = EXIT_FAILED


class ConfigError(StartError):
    """A setting is unknown, malformed or out of range; `metadata["key"]` names it."""

    reason = "CONFIG_INVALID"
    exit_status = EXIT_CONFIG

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(f"{key}: {problem}", key=key)
        self.key = key
