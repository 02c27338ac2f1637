"""A client's secret, `llmos_sk_<id>_<64 hex digits>`: one format for every door.

The 32 bytes are the client's CURVE secret key; the whole text is its password where there is no CURVE. What the daemon keeps of it is
the CURVE public key and the SHA-256 of the text, from which neither can be computed back. The id is not secret.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import struct
from dataclasses import dataclass, field

import zmq
from zmq.utils import z85

from llmos.errors import InvalidRequest

PREFIX = "llmos_sk_"
_FORM = re.compile(rf"{PREFIX}([0-9a-f]{{8}})_([0-9a-f]{{64}})")
_Z85_KEY = re.compile(r"[0-9A-Za-z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")


@dataclass(frozen=True, slots=True)
class Secret:
    """One secret. Its text stays out of `repr`, and so out of logs and tracebacks."""

    id: str
    text: str = field(repr=False)

    @classmethod
    def make(cls) -> Secret:
        key_id = secrets.token_hex(4)
        _, curve_secret = zmq.curve_keypair()
        return cls(key_id, f"{PREFIX}{key_id}_{z85.decode(curve_secret).hex()}")

    @classmethod
    def parse(cls, text: str) -> Secret:
        """Raises `InvalidRequest`, which does not repeat the text: it may be a secret with a typing error."""
        found = _FORM.fullmatch(text.strip())
        if found is None:
            raise InvalidRequest(f"key: not of the form {PREFIX}<8 hex digits>_<64 hex digits>", field="key")
        return cls(found[1], found[0])

    @property
    def curve_secret(self) -> bytes:
        """Z85, as libzmq takes it."""
        return z85.encode(bytes.fromhex(self.text[-64:]))

    @property
    def public_key(self) -> str:
        """Z85 of the CURVE public key."""
        return zmq.curve_public(self.curve_secret).decode()

    @property
    def sha256(self) -> str:
        return sha256(self.text)


def sha256(text: str) -> str:
    """Of a whole secret. A plain hash will do: 256 random bits can not be guessed, however fast the guesses are tested."""
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def is_public_key(text: str) -> bool:
    """Is it the Z85 text of 32 bytes?"""
    if _Z85_KEY.fullmatch(text) is None:
        return False
    try:
        return z85.encode(z85.decode(text)) == text.encode()
    except struct.error:  # a group of five over 32 bits
        return False
