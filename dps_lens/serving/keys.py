"""Keys to a server: kept as digests, compared in constant time."""

import hashlib
import hmac
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from dps_lens.errors import DataError
from dps_lens.files import read_json, write_json

_PREFIX = "dps-"


@dataclass(frozen=True)
class Key:
    """Who may ask.

    Attributes:
        name: of whoever holds it, for logs.
        sha256: of the key. Keys are 256 random bits, which nobody guesses: a slow hash would add nothing.
        admin: may write and delete profiles.
        users: whose profiles may be steered with; None for all.
    """

    name: str
    sha256: str
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
        found = read_json(path, DataError)
        try:
            keys = [Key(**{**one, "users": None if one.get("users") is None else tuple(one["users"])}) for one in found]
        except (TypeError, AttributeError) as error:
            raise DataError(f"{path} holds no keys; make one with 'dps-lens key NAME --keys {path}'") from error
        if not keys:
            raise DataError(f"{path} holds no keys; make one with 'dps-lens key NAME --keys {path}'")
        return cls(keys)

    def find(self, header: str | None) -> Key | None:
        """The key of an `Authorization` header, if it is one of these."""
        scheme, _, given = (header or "").partition(" ")
        digest = _digest(given.strip()) if scheme.lower() == "bearer" else ""
        found = None
        for one in self.keys:  # all of them, always: what is compared does not tell how long it takes
            if hmac.compare_digest(one.sha256, digest):
                found = one
        return found


def add_key(path: str | Path, name: str, *, admin: bool = False, users: Sequence[str] | None = None) -> str:
    """Make a key, and keep its digest in a file.

    Returns:
        the key, which is not kept anywhere.

    Raises:
        DataError: the file holds something else, or a key of this name.
    """
    kept = Keys.read(path).keys if Path(path).exists() else ()
    if any(one.name == name for one in kept):
        raise DataError(f"{path} holds a key of the name {name!r}; take another, or delete its line there")
    key = _PREFIX + secrets.token_urlsafe(32)
    new = Key(name, _digest(key), admin, None if users is None else tuple(users))
    write_json(path, [asdict(one) for one in (*kept, new)])
    return key


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
