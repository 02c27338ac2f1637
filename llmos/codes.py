"""Numbers and words that appear on the wire: error codes, finish reasons, sequence states. Append-only; imports nothing of ours."""

from __future__ import annotations

from enum import IntEnum


class ErrorCode(IntEnum):
    """One per error class in `llmos.errors`. Never renumbered."""

    INTERNAL = 1
    INVALID_REQUEST = 2
    CONTEXT_TOO_LONG = 3
    NOT_FOUND = 4
    PERMISSION = 5
    OVERLOADED = 6
    UNAVAILABLE = 7
    NOT_RUNNING = 8
    SEQUENCE_FAILED = 9
    PROTOCOL = 10
    VERSION_MISMATCH = 11
    CONFIG = 12
    MODEL = 13
    TIMEOUT = 14
    WRONG_STATE = 15
    UNAUTHORIZED = 16


class FinishReason(IntEnum):
    """Why a sequence ended. Every accepted sequence gets exactly one."""

    STOP = 1  # stop token, end-of-sequence token or stop string
    LENGTH = 2  # max_tokens or the model's context length
    CANCELLED = 3  # its client left or cancelled
    KILLED = 4  # `kill` by its owner or an administrator
    EXECUTOR_LOST = 5  # the executor died and no replacement came
    NUMERICAL_ERROR = 6  # NaN or Inf logits for this row
    SHUTDOWN = 7  # the daemon stopped before the sequence ended
    TOKENIZER_FAILED = 8  # text could not be decoded
    DEADLINE = 9  # its deadline passed while it waited
    CLOSED = 10  # an open sequence, by its owner
    DEPENDENCY = 11  # a sequence that it waited for (`after`) failed, was cancelled or killed
    IDLE = 12  # an open sequence that nobody used for too long
    POISONED = 13  # it killed the executor again and again
    JOURNAL_CORRUPT = 14  # the microkernel died, and part of what the journal said of it is damaged
    GRAMMAR_FAILED = 15  # its grammar came to a point from which no token leads on, or took too much to compute

    @property
    def is_failure(self) -> bool:
        """True if the caller did not ask for this ending."""
        return self in (
            self.EXECUTOR_LOST,
            self.NUMERICAL_ERROR,
            self.SHUTDOWN,
            self.TOKENIZER_FAILED,
            self.DEADLINE,
            self.DEPENDENCY,
            self.POISONED,
            self.JOURNAL_CORRUPT,
            self.GRAMMAR_FAILED,
        )


class SeqState(IntEnum):
    """Life of a sequence; the transition table is in `llmos.microkernel.sequence`."""

    WAITING = 1  # admitted to the run queue, holds no row
    RUNNING = 2  # holds a row and pages
    PREEMPTED = 3  # lost row and pages, will be recomputed; waits again
    FINISHED = 4
    SUSPENDED = 5  # by its owner: holds no row; its pages are kept, swapped or dropped
    BLOCKED = 6  # waits for input, or for other sequences; keeps its pages while nobody needs them
    SWAPPED = 7  # lost row and pages, its KV is in host pages; waits again


class PageFate(IntEnum):
    """What becomes of the pages of a sequence that leaves the machine for a while."""

    KEEP = 0  # its own until somebody else needs them
    SWAP = 1  # copied to host pages and given back; if the host has no room, dropped
    DROP = 2  # given back and recomputed later


class ServiceState(IntEnum):
    """Life of a child process; the transition table is in `llmos.supervisor.states`."""

    STOPPED = 1
    STARTING = 2
    RUNNING = 3
    BACKOFF = 4
    STOPPING = 5
    FATAL = 6
