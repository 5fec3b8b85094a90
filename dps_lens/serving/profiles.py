"""What a server knows of its users: a file each, with heads, a vector, how to steer with them, and documents."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote, unquote

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dps_lens.data import Document, User
from dps_lens.data.tasks import TASKS
from dps_lens.errors import DataError, FileError, HeadError, SteeringError
from dps_lens.files import as_json, leftovers, read_object, write_text, writing
from dps_lens.found import FoundHeads
from dps_lens.heads import HeadSet
from dps_lens.model import HookedModel, describe_model
from dps_lens.result import provenance
from dps_lens.scores import HeadScores
from dps_lens.serving.steered import Steering
from dps_lens.steering import HeadVector
from dps_lens.vectors import HeadVectors

_LONGEST_NAME = 200
_AT_WORK = 60.0
"""Seconds after which a file that is being written has been left."""

_SAME = ("name", "n_layers", "n_heads", "weights")

Strength = Annotated[float, Field(allow_inf_nan=False)]
UserName = Annotated[str, Field(min_length=1, max_length=_LONGEST_NAME)]


class Strict(BaseModel):
    """Takes the fields that it has, of the types that it names."""

    model_config = ConfigDict(extra="forbid", strict=True)


class HeadRows(Strict):
    """A vector of heads: a row of `d_head` numbers for each."""

    heads: str
    values: list[list[Strength]]


class ProfileDocument(Strict):
    """A document of a user, with the fields that its task reads."""

    id: str
    fields: dict[str, Any]
    date: str | None = None


class SteeringProfile(Strict):
    """How a user is steered for: what `dps-lens profile make` writes, and `PUT /v1/profiles/USER` takes.

    Attributes:
        user: whose it is.
        model: name, layers, heads and digest of the weights that it was made with; a server of another model refuses
            it.
        heads: by name, `"L12H3,L4H0"`, for rules of heads.
        vector: for rules that add one.
        rule: of `generate`.
        gamma: its strength.
        alpha: its second strength.
        max_kl: cap on KL(steered ‖ full) at every step, nats.
        documents: of the user; those that go with a message are shown before it.
        task: how they read.
        made: who made it, when.
    """

    user: UserName
    model: dict[str, Any] = Field(default_factory=dict)
    heads: str = ""
    vector: HeadRows | None = None
    rule: str = "dps"
    gamma: Strength = 1.0
    alpha: Strength = 0.5
    max_kl: Strength | None = None
    documents: list[ProfileDocument] = Field(default_factory=list)
    task: str = "questions"
    made: dict[str, Any] = Field(default_factory=dict)

    def head_set(self) -> HeadSet:
        """The heads, best first."""
        return HeadSet.parse(self.heads, label=self.user)

    def head_vector(self) -> HeadVector | None:
        """The vector, of heads of the model that it was made with."""
        if self.vector is None:
            return None
        shape = (int(self.model.get("n_layers", 0)), int(self.model.get("n_heads", 0)))
        return HeadVector(
            torch.tensor(self.vector.values), HeadSet(HeadSet.parse(self.vector.heads), "", shape), self.user
        )

    def history(self) -> list[Document]:
        """The documents."""
        return [Document(one.id, one.fields, one.date) for one in self.documents]

    def steering(self) -> Steering:
        """How the user's answers are steered."""
        return Steering(
            rule=self.rule,
            heads=self.head_set(),
            vector=self.head_vector(),
            gamma=self.gamma,
            alpha=self.alpha,
            max_kl=self.max_kl,
            history=tuple(self.history()),
            task=self.task,
        )

    def check(self, model: HookedModel, about: Mapping[str, Any]) -> None:
        """Refuse what a model cannot be steered with.

        Args:
            model: a hooked model, of which the sizes are read.
            about: of `model_of`, which reads its weights.

        Raises:
            SteeringError: the profile is of another model, or its rule, strengths, heads, vector or documents are none.
        """
        for name in _SAME:
            # Digests of weights in another number format differ in any case.
            if name == "weights" and self.model.get("dtype") != about["dtype"]:
                continue
            if name in self.model and self.model[name] != about[name]:
                raise SteeringError(
                    f"the profile of user {self.user!r} was made with another model, or another version of "
                    f"transformer-lens: its {name} is {str(self.model[name])[:60]!r}, served is "
                    f"{str(about[name])[:60]!r}; make it anew"
                )
        try:
            steering = self.steering()
        except (HeadError, ValueError) as error:
            raise SteeringError(f"the profile of user {self.user!r}: {error}") from error
        steering.check(f"the profile of user {self.user!r}", model)
        task = TASKS.get(self.task)
        if task is None:
            raise SteeringError(f"the profile of user {self.user!r}: task {self.task!r} is none of {', '.join(TASKS)}")
        for one in self.documents:
            if lacking := [name for name in task.fields if name not in one.fields]:
                raise SteeringError(
                    f"the profile of user {self.user!r}: document {one.id!r} lacks the field {lacking[0]!r} of task "
                    f"{self.task!r}"
                )


def make_profiles(
    users: Sequence[User],
    heads: HeadScores | FoundHeads | None = None,
    *,
    vectors: HeadVectors | None = None,
    k: int | None = None,
    own: bool = False,
    documents: bool = False,
    **settings: Any,
) -> list[SteeringProfile]:
    """A profile for each user, of what was found on their examples.

    Args:
        users: whose.
        heads: of `score_heads` or `find_heads`.
        vectors: of the same users, of `head_vectors`.
        k: heads to take; by default 10, of `find_heads` the whole set.
        own: take the first heads by a user's own examples, not by those of all.
        documents: keep the users' documents in the profiles, which a server then shows in prompts.
        settings: `rule`, `gamma`, `alpha` and `max_kl` of the profiles.

    Raises:
        SteeringError: a user has no vector, or heads and vectors are of two models.
        ScoreError: a user has no scores.
    """
    sources = [one for one in (heads, vectors) if one is not None]
    models = [{name: one.manifest.get("model", {}).get(name) for name in (*_SAME, "dtype")} for one in sources]
    if not models or any(model != models[0] for model in models):
        raise SteeringError(
            "profile: heads and vectors are of two models" if models else "profile: give heads, vectors, or both"
        )
    made = []
    for user in users:
        chosen, vector = HeadSet(), None
        if heads is not None:
            if isinstance(heads, FoundHeads) and k is None and not own:
                chosen = heads.heads
            else:
                chosen = heads.top(10 if k is None else k, user.id if own else None)
        if vectors is not None:
            if user.id not in vectors:
                raise SteeringError(f"profile: user {user.id!r} has no vector there")
            rows = vectors[user.id]
            vector = HeadRows(heads=str(rows.heads), values=rows.values.tolist())
        kept = [ProfileDocument(id=one.id, fields=dict(one.fields), date=one.date) for one in user.history]
        made.append(
            SteeringProfile(
                user=user.id,
                model=models[0],
                heads=str(chosen),
                vector=vector,
                documents=kept if documents else [],
                task=user.task.name,
                made=provenance(),
                **settings,
            )
        )
    return made


def model_of(model: HookedModel) -> dict[str, Any]:
    """What a profile notes of the model that it is for."""
    found = describe_model(model)
    return {name: found[name] for name in (*_SAME, "dtype")}


class ProfileStore:
    """Profiles in a folder, a file each, whole or absent, for their owner alone; several servers may share the folder.

    Args:
        folder: made where it is missing; what writers who were killed have left there is removed.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.glob(".*.json.*.tmp"):
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > _AT_WORK:
                    path.unlink()

    def path(self, user: str) -> Path:
        """The file of a user: the name as in an address, so that none leads out of the folder.

        Raises:
            DataError: the name is empty or too long for a file.
        """
        try:
            name = quote(user, safe="")
        except UnicodeEncodeError as error:
            raise DataError(f"the user's name {user[:60]!r} holds half of a character") from error
        if not name or len(name) > _LONGEST_NAME:
            raise DataError(f"a user's name takes 1 to {_LONGEST_NAME} characters in a file's name")
        return self.folder / f"{name}.json"

    def __iter__(self) -> Iterator[str]:
        """Users, in the order of their files."""
        yield from (unquote(path.name.removesuffix(".json")) for path in sorted(self.folder.glob("*.json")))

    def read(self, user: str) -> SteeringProfile | None:
        """The profile of a user, or None.

        Raises:
            FileError: its file is no profile.
        """
        path = self.path(user)
        if not path.is_file():
            return None
        found = self._read(path)
        # A file system may not tell two names apart that differ in case.
        return found if found.user == user else None

    def _read(self, path: Path) -> SteeringProfile:
        try:
            return SteeringProfile(**read_object(path, DataError))
        except (DataError, ValidationError) as error:
            why = first_problem(error) if isinstance(error, ValidationError) else str(error)
            raise FileError(f"{path.name} is no profile ({why}); write it anew, or delete it") from error

    def _is_anothers(self, path: Path, user: str) -> bool:
        """Whether a file is that of another user, whose name a file system does not tell apart."""
        try:
            return path.is_file() and self._read(path).user != user
        except FileError:  # what nobody can read is nobody's
            return False

    def write(self, profile: SteeringProfile) -> None:
        """Keep a profile in place of the one that was there; a reader sees the one or the other.

        Raises:
            DataError: the user's name is none for a file, or the file of this name is another user's.
            FileError: it cannot be written; the one that was there is kept.
        """
        path = self.path(profile.user)
        if self._is_anothers(path, profile.user):
            raise DataError(f"the file of user {profile.user!r} would be that of another user, on this file system")
        made = profile.made or provenance()
        text = as_json(profile.model_copy(update={"made": made}).model_dump(), sort_keys=False)
        write_text(path, text, private=True)

    def delete(self, user: str) -> bool:
        """Delete everything that is kept of a user; whether there was anything.

        Raises:
            FileError: it cannot be deleted.
        """
        path = self.path(user)
        if self._is_anothers(path, user):
            return False
        there = path.is_file()
        try:
            # The file last: who is interrupted before finds it still there, and deletes again.
            for one in (*leftovers(path), path):
                one.unlink(missing_ok=True)
        except OSError as error:
            raise FileError(f"the profile of user {user!r} cannot be deleted ({error.strerror})") from error
        return there


def first_problem(error: ValidationError) -> str:
    """What is wrong with the first field that does not fit."""
    found = error.errors()[0]
    place = ".".join(str(part) for part in found["loc"])
    return f"{place}: {found['msg']}" if place else found["msg"]
