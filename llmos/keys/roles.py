"""What a key may do, as three roles, each with all rights of the one before. Which message needs which role is the gateway's table."""

from __future__ import annotations

from enum import IntEnum

from llmos.errors import InvalidRequest


class Role(IntEnum):
    """SUBMIT: make sequences, and drive those of its tenant. INSPECT: also see what its tenant and the machine do. ADMIN: everything,
    of every tenant.
    """

    SUBMIT = 1
    INSPECT = 2
    ADMIN = 3

    @property
    def word(self) -> str:
        return self.name.lower()


def role_of(word: str) -> Role:
    """The role of this name; raises `InvalidRequest`."""
    for role in Role:
        if role.word == word:
            return role
    raise InvalidRequest(f"role: {word!r} is not one of {', '.join(role.word for role in Role)}", field="role")
