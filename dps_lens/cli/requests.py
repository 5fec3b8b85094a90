"""What `dps-lens steer` is asked for: a prompt, the users' examples, or a JSON-lines file of requests."""

import json
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dps_lens.cli.vectors import name_of, vector_of

if TYPE_CHECKING:
    from dps_lens.data import Example, User
    from dps_lens.steering.rules import Rule
    from dps_lens.steering.sampling import Sampling
    from dps_lens.steering.vector import Vector

STRENGTHS = ("gamma", "alpha")
SAMPLING = ("temperature", "top_k", "top_p", "seed")


@dataclass(frozen=True)
class Request:
    """One prompt with its settings.

    Attributes:
        about: what was asked for, in the words of the file.
        prompt: a text; None where an example is asked for.
        example: of a user.
        settings: `heads`, strengths and sampling.
    """

    about: Mapping[str, Any]
    prompt: str | None = None
    example: "Example | None" = None
    settings: Mapping[str, Any] = field(default_factory=dict)


class _Line(BaseModel):
    """A line of a requests file; null where there is no limit. Only fields that are given count."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    id: str | None = None
    prompt: str | None = None
    user: str | None = None
    example: str | None = None
    heads: str = ""
    vector_of: str = ""
    gamma: float = 0.0
    alpha: float = 0.0
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = Field(None, lt=2**31)
    top_p: float | None = None
    seed: int = Field(0, ge=0, lt=2**32)

    @model_validator(mode="after")
    def _one_prompt(self) -> "_Line":
        if (self.prompt is None) == (self.user is None):
            raise ValueError("give either 'prompt' or 'user'")
        if self.example is not None and self.user is None:
            raise ValueError("field 'example' needs 'user'")
        return self


def read_requests(
    path: Path,
    users: "Sequence[User]",
    defaults: Mapping[str, Any],
    rule: "Rule",
    vectors: "Mapping[str, Vector] | Vector | None" = None,
) -> list[Request]:
    """Requests of a file, one JSON object a line; all are checked before the first is answered.

    A line holds `prompt`, or `user` with, if wanted, the `example` (the newest by default); and, if wanted, `id`,
    `heads`, `vector_of`, `gamma`, `alpha`, `do_sample`, `temperature`, `top_k`, `top_p`, `seed`; null where there is
    no limit.

    Raises:
        DataError: a line is malformed; names file, line and field.
    """
    from dps_lens.errors import DataError
    from dps_lens.files import parse_json

    by_id, requests = {user.id: user for user in users}, []
    for number, text in _lines(path):
        where = f"{path.name}, line {number}"
        try:
            line = _Line.model_validate(parse_json(text, where, DataError))
        except ValidationError as error:
            raise DataError(f"{where}: {_said(error)}") from None
        given = {name: getattr(line, name) for name in line.model_fields_set}
        settings = dict(defaults) | {name: value for name, value in given.items() if name in defaults}
        if vectors is not None:
            settings["vector_of"] = name_of(vectors, settings["vector_of"], line.user)
        elif "vector_of" in given:
            raise DataError(f"{where}: field 'vector_of' is for rules that add vectors, such as head_vector")
        _check(where, line, settings, rule, vectors)
        about: dict[str, Any] = {name: given[name] for name in ("id", "prompt", "user", "example") if name in given}
        example = _example(where, line, by_id) if line.user is not None else None
        if example:
            about |= {"example": example.id, "reference": example.reference}
        requests.append(Request({"line": number, **about}, line.prompt, example, settings))
    if not requests:
        raise DataError(f"{path.name}: no requests")
    return requests


def _said(error: ValidationError) -> str:
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"field {name[:60]!r} is unknown; use some of {', '.join(_Line.model_fields)}"
    message = first["msg"].removeprefix("Value error, ")
    return f"field {name!r} is {reprlib.repr(first['input'])}: {message}" if name else message


def sampling_of(settings: Mapping[str, Any]) -> "Sampling | None":
    """How a request is sampled; None for greedy decoding.

    Raises:
        SteeringError: a setting makes no sense.
    """
    from dps_lens.steering.sampling import Sampling

    sampling = Sampling(**{name: settings[name] for name in SAMPLING})
    return sampling if settings["do_sample"] else None


def _check(
    where: str,
    line: _Line,
    settings: Mapping[str, Any],
    rule: "Rule",
    vectors: "Mapping[str, Vector] | Vector | None",
) -> None:
    """What `generate` would refuse when it comes to this line."""
    from dps_lens.errors import DataError, DPSLensError
    from dps_lens.heads import HeadSet
    from dps_lens.steering.rules import check_strength

    try:
        heads = HeadSet.parse(settings["heads"])
        for name in STRENGTHS:
            check_strength(name, settings[name])
        sampling_of(settings)
        if vectors is not None:
            vector_of(vectors, settings["vector_of"])
    except DPSLensError as error:
        raise DataError(f"{where}: {error}") from error
    if rule.needs_heads and not len(heads):
        raise DataError(f"{where}: no heads; give 'heads', or --run or --heads for all lines")
    if rule.needs_negative and line.user is None:
        raise DataError(f"{where}: this rule needs prompts with a profile; give 'user' instead of 'prompt'")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    from dps_lens.errors import DataError
    from dps_lens.files import read_text

    for number, line in enumerate(read_text(path, DataError).split("\n"), start=1):
        if line.strip():
            yield number, line


def _example(where: str, line: _Line, users: "Mapping[str, User]") -> "Example":
    from dps_lens.errors import DataError

    user = users.get(str(line.user))
    if user is None:
        raise DataError(f"{where}: field 'user' is {_short(line.user)}, who is not among --users")
    examples = {example.id: example for example in user.examples}
    if line.example is None:
        if not examples:
            raise DataError(f"{where}: field 'user' is {line.user!r}, who has no evaluation example")
        return user.examples[-1]
    if line.example not in examples:
        known = ", ".join(examples)[:200]
        raise DataError(f"{where}: field 'example' is {_short(line.example)}; the user has {known}")
    return examples[line.example]


def _short(value: object) -> str:
    return repr(value)[:200]


class Lines:
    """JSON lines that are printed, or kept in a file that an interrupted command goes on with.

    Beside the file lies `NAME.run.json`, which says what decides its lines: weights, prompts, decoding.

    Args:
        out: the file; None prints.
        requests: a line each.
        settings: of all lines.
        force: drop what the file holds.

    Attributes:
        done: lines that are there.

    Raises:
        RunError: the file holds lines of other requests.
    """

    def __init__(
        self, out: Path | None, requests: Sequence[Request], settings: Mapping[str, Any], *, force: bool = False
    ) -> None:
        self._out, self._settings, self._force = out, settings, force
        self._size = 0
        self.done = self._kept(out, requests) if out is not None and out.exists() and not force else 0

    def begin(self, fingerprint: Mapping[str, Any]) -> None:
        """Be ready to write; up to here, nothing is changed.

        Args:
            fingerprint: everything that decides the lines beside what they say.

        Raises:
            RunError: the lines that are there were made otherwise.
        """
        if self._out is None:
            return
        from dps_lens.errors import RunError
        from dps_lens.runs import claim

        beside = self._out.with_name(f"{self._out.name}.run.json")
        if self._force:
            self._out.unlink(missing_ok=True)
            beside.unlink(missing_ok=True)
        if self.done and not beside.is_file():
            raise RunError(
                f"{self._out}: there is no {beside.name} beside it that says what its lines were made with; use "
                "another file, or --force to start anew"
            )
        claim(beside, fingerprint, self._out)
        self._cut()

    def _cut(self) -> None:
        """Drop a line that has no end: it was being written when the command was stopped."""
        from dps_lens.files import replacing

        if self._out is None or not self._out.exists():
            return
        whole = self._out.read_bytes()
        kept = whole[: whole.rfind(b"\n") + 1]
        self._size = len(kept)
        if kept != whole:
            with replacing(self._out) as temporary:
                temporary.write_bytes(kept)

    def row(self, request: Request) -> dict[str, Any]:
        """What a line says of its request; `data` is a digest of an example's texts."""
        row = {**request.about, **self._settings, **request.settings}
        row |= {"heads": str(row["heads"])}
        return row | ({"data": _digest(request.example)} if request.example is not None else {})

    def _kept(self, out: Path, requests: Sequence[Request]) -> int:
        from dps_lens.errors import RunError
        from dps_lens.files import parse_json

        try:
            *whole, torn = out.read_bytes().split(b"\n")
        except OSError as error:
            raise RunError(f"{out} cannot be read ({error.strerror}); use another file") from error
        if torn and not whole and not torn.startswith(b"{"):
            raise RunError(f"{out}, line 1 was not written by this command; use another file")
        for number, (line, request) in enumerate(zip(whole, requests, strict=False), start=1):
            row = json.loads(json.dumps(self.row(request)))
            try:
                kept = dict(parse_json(line.decode(), f"{out}, line {number}", RunError))
            except (RunError, ValueError, TypeError) as error:
                raise RunError(f"{out}, line {number} was not written by this command; use another file") from error
            changed = [name for name, value in row.items() if kept.get(name) != value]
            if changed:
                raise RunError(
                    f"{out}, line {number}: {changed[0]} was {_short(kept.get(changed[0]))}, now "
                    f"{_short(row[changed[0]])}; use another file, or --force to start anew"
                )
        if len(whole) > len(requests):
            raise RunError(f"{out} holds {len(whole)} lines for {len(requests)} requests; use another file")
        return len(whole)

    def write(self, request: Request, written: Mapping[str, Any]) -> None:
        """One finished request.

        Raises:
            RunError: somebody else writes to the file.
        """
        import typer

        from dps_lens.errors import RunError
        from dps_lens.files import append_line

        line = json.dumps(self.row(request) | dict(written), ensure_ascii=False)
        if self._out is None:
            typer.echo(line)
            return
        if (self._out.stat().st_size if self._out.exists() else 0) != self._size:
            raise RunError(f"{self._out}: another command writes to this file; let it end, or use another file")
        append_line(self._out, line)
        self._size = self._out.stat().st_size


def _digest(example: "Example") -> str:
    from dps_lens.data.examples import data_digest

    return data_digest([], [example])
