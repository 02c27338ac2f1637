"""Which role a message needs: the whole table. A message that is not in it can not be asked for.

It says what one may do, not to whom: everybody below an administrator reaches the sequences of its own tenant only, and others
answer as if they were not there (`Asker.limited_to`, judged by the microkernel). A nice value below 0 is for administrators, too
(validate.py).
"""

from __future__ import annotations

from llmos.errors import PermissionRefused
from llmos.keys.roles import Role
from llmos.protocol.messages import (
    Ack,
    After,
    Append,
    Attach,
    Cancel,
    Close,
    Continue,
    Deadline,
    Detokenize,
    Embed,
    Explain,
    Fork,
    Generate,
    Kill,
    MeasuresGet,
    Message,
    ModelsGet,
    Nice,
    PsGet,
    RecordWrite,
    RestartService,
    Resume,
    Spawn,
    Stat,
    StatusGet,
    Suspend,
    TenantSet,
    TenantsGet,
    Tokenize,
    Wait,
)

RIGHTS: dict[type[Message], Role] = {
    # Make sequences, and drive those of the own tenant whose numbers one knows.
    Generate: Role.SUBMIT,
    Embed: Role.SUBMIT,
    Spawn: Role.SUBMIT,
    Append: Role.SUBMIT,
    Continue: Role.SUBMIT,
    Attach: Role.SUBMIT,
    Ack: Role.SUBMIT,
    Cancel: Role.SUBMIT,
    Tokenize: Role.SUBMIT,
    Detokenize: Role.SUBMIT,
    ModelsGet: Role.SUBMIT,
    Kill: Role.SUBMIT,
    Nice: Role.SUBMIT,
    Suspend: Role.SUBMIT,
    Resume: Role.SUBMIT,
    Fork: Role.SUBMIT,
    Wait: Role.SUBMIT,
    Stat: Role.SUBMIT,
    Close: Role.SUBMIT,
    Deadline: Role.SUBMIT,
    After: Role.SUBMIT,
    # See what the own tenant does, and how the machine is.
    PsGet: Role.INSPECT,
    Explain: Role.INSPECT,
    TenantsGet: Role.INSPECT,
    StatusGet: Role.INSPECT,
    MeasuresGet: Role.INSPECT,
    # Change the machine for everybody.
    TenantSet: Role.ADMIN,
    RecordWrite: Role.ADMIN,
    RestartService: Role.ADMIN,
}


def check_right(role: Role, message: Message) -> None:
    """Raise `PermissionRefused` if the role does not allow the message."""
    needed = RIGHTS.get(type(message))
    name = type(message).__name__
    if needed is None:
        raise PermissionRefused(f"{name} is not for clients")
    if role < needed:
        raise PermissionRefused(f"{name} is for the role {needed.word}; this session has {role.word}")
