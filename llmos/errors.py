"""Every error llmos raises on purpose.

    LlmosError
    ├── InvalidRequest        the caller's mistake; names the field and the limit
    │   └── ContextTooLong    prompt does not fit the model's context
    ├── NotFound              unknown model or sequence (a foreign sequence answers exactly like an unknown one)
    ├── PermissionRefused     the session lacks the right
    ├── Unauthorized          no key, or one that is unknown or revoked
    ├── Overloaded            admission refused; retry later
    ├── Unavailable           a service that is needed is not there (starting, dead, draining)
    │   └── DaemonNotRunning  nothing listens on the run directory's socket
    ├── WrongState            the sequence is there, but not in a state in which the verb makes sense
    ├── SequenceFailed        accepted, then ended by a typed reason (executor_lost, numerical_error, ...)
    ├── ProtocolError         undecodable frame, unknown message type, unknown field, over a size limit
    │   └── VersionMismatch   protocol version or schema hash differs
    ├── ConfigError           configuration file: names key, line and the nearest valid key
    ├── ModelError            model directory: missing, corrupt or unsupported
    └── RequestTimeout        no answer within the caller's time limit

Invariant: each class maps to exactly one wire `ErrorCode` and back (`from_code`), so an error keeps its type across processes.
"""

from __future__ import annotations

from llmos.codes import ErrorCode


class LlmosError(Exception):
    """Base class. `code` goes on the wire; `field` names the offending request field, if there is one.

    `retry_after_s`: a guess when the same request may be accepted, where one can be made.
    """

    code: ErrorCode = ErrorCode.INTERNAL

    def __init__(
        self, message: str, *, field: str | None = None, rid: int | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.message = message
        self.field = field
        self.rid = rid


class InvalidRequest(LlmosError):
    code = ErrorCode.INVALID_REQUEST


class ContextTooLong(InvalidRequest):
    code = ErrorCode.CONTEXT_TOO_LONG


class NotFound(LlmosError):
    code = ErrorCode.NOT_FOUND


class PermissionRefused(LlmosError):
    code = ErrorCode.PERMISSION


class Unauthorized(LlmosError):
    code = ErrorCode.UNAUTHORIZED


class Overloaded(LlmosError):
    code = ErrorCode.OVERLOADED


class Unavailable(LlmosError):
    code = ErrorCode.UNAVAILABLE


class DaemonNotRunning(Unavailable):
    code = ErrorCode.NOT_RUNNING


class WrongState(LlmosError):
    code = ErrorCode.WRONG_STATE


class SequenceFailed(LlmosError):
    code = ErrorCode.SEQUENCE_FAILED


class ProtocolError(LlmosError):
    code = ErrorCode.PROTOCOL


class VersionMismatch(ProtocolError):
    code = ErrorCode.VERSION_MISMATCH


class ConfigError(LlmosError):
    code = ErrorCode.CONFIG


class ModelError(LlmosError):
    code = ErrorCode.MODEL


class RequestTimeout(LlmosError):
    code = ErrorCode.TIMEOUT


def _classes(root: type[LlmosError]) -> list[type[LlmosError]]:
    return [root, *(found for child in root.__subclasses__() for found in _classes(child))]


_BY_CODE: dict[int, type[LlmosError]] = {cls.code: cls for cls in _classes(LlmosError)}


def from_code(
    code: int, message: str, *, field: str | None = None, rid: int | None = None, retry_after_s: float | None = None
) -> LlmosError:
    """Rebuild the typed error of a wire code; an unknown code becomes the base class."""
    return _BY_CODE.get(code, LlmosError)(message, field=field, rid=rid, retry_after_s=retry_after_s)
