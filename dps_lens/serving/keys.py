"""Keys to a server: kept as digests, compared in constant time."""

import hashlib
import hmac
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from dps_lens.errors import DataError
from dps_lens.files import as_json, read_json, write_text

_PREFIX = "dps-"


class Key(BaseModel):
    """Who may ask.

    Attributes:
        name: of whoever holds it, for logs.
        sha256: of the key. Keys are 256 random bits, which nobody guesses: a slow hash would add nothing.
        admin: may write and delete profiles.
        users: whose profiles may be steered with; None for all.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(min_length=1)]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    admin: bool = False
    users: tuple[str, ...] | None = None

    def may_use(self, user: str) -> bool:
        """Whether it may steer with a user's profile."""
        return self.users is None or user in self.users


class Keys:
    """The keys of a server.

    Args:
        keys: that are let in; without any, everybody is, and nobody is an admin.
    """

    def __init__(self, keys: Sequence[Key] = ()) -> None:
        self.keys = tuple(keys)

    @classmethod
    def read(cls, path: str | Path) -> "Keys":
        """Keys of a file that `add_key` wrote.

        Raises:
            DataError: it holds none.
        """
        try:
            keys = TypeAdapter(list[Key]).validate_python(read_json(path, DataError))
        except ValidationError as error:
            raise DataError(f"{path} holds no keys; make one with 'dps-lens key NAME --keys {path}'") from error
        if not keys:
            raise DataError(f"{path} holds no keys; make one with 'dps-lens key NAME --keys {path}'")
        return cls(keys)

    def find(self, header: str | None) -> Key | None:
        """The key of an `Authorization` header, if it is one of these."""
        scheme, _, given = (header or "").partition(" ")
        if scheme.lower() != "bearer" or not given.strip():
            return None
        digest, found = _digest(given.strip()), None
        for one in self.keys:  # all of them, always: what is compared does not tell how long it takes
            if hmac.compare_digest(one.sha256, digest):
                found = one
        return found


def add_key(path: str | Path, name: str, *, admin: bool = False, users: Sequence[str] | None = None) -> str:
    """Make a key, and keep its digest in a file.

    Returns:
        the key, which is not kept anywhere.

    Raises:
        DataError: the file holds something else, or a key of this name; or an admin's users are named.
    """
    if admin and users is not None:
        raise DataError("an admin reads and writes the profiles of all users; leave users out, or admin")
    kept = Keys.read(path).keys if Path(path).exists() else ()
    if any(one.name == name for one in kept):
        raise DataError(f"{path} holds a key of the name {name!r}; take another, or delete its line there")
    key = _PREFIX + secrets.token_urlsafe(32)
    new = Key(name=name, sha256=_digest(key), admin=admin, users=None if users is None else tuple(users))
    write_text(path, as_json([one.model_dump(mode="json") for one in (*kept, new)]), private=True)
    return key


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
