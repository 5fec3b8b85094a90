"""What `dps-lens steer` is asked for: a prompt, the users' examples, or a JSON-lines file of requests."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dps_lens.data import Example, User
    from dps_lens.steering.rules import Rule

STRENGTHS: dict[str, type] = {"gamma": float, "alpha": float}
SAMPLING: dict[str, type] = {"do_sample": bool, "temperature": float, "top_k": int, "top_p": float, "seed": int}
_NAMES: dict[str, type] = {"id": str, "prompt": str, "user": str, "example": str, "heads": str}
_WORDS = {str: "a text", float: "a number", int: "a whole number", bool: "true or false"}


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


def read_requests(path: Path, users: "Sequence[User]", defaults: Mapping[str, Any], rule: "Rule") -> list[Request]:
    """Requests of a file, one JSON object a line; all are checked before the first is answered.

    A line holds `prompt`, or `user` with, if wanted, the `example` (the newest by default); and, if wanted, `id`,
    `heads`, `gamma`, `alpha`, `do_sample`, `temperature`, `top_k`, `top_p`, `seed`; null where there is no limit.

    Raises:
        DataError: a line is malformed; names file, line and field.
    """
    from dps_lens.errors import DataError

    by_id, found = {user.id: user for user in users}, []
    for number, line in _lines(path):
        where = f"{path.name}, line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: not valid JSON ({error.msg}); is it cut off?") from error
        if not isinstance(record, dict):
            raise DataError(f"{where}: not a JSON object")
        kinds = {**_NAMES, **STRENGTHS, **SAMPLING}
        for name, value in record.items():
            if name not in kinds:
                raise DataError(f"{where}: field {name!r} is unknown; use some of {', '.join(kinds)}")
            if value is None and name in ("top_k", "top_p"):
                continue
            whole = kinds[name] is float and isinstance(value, int)
            if (not isinstance(value, kinds[name]) and not whole) or (isinstance(value, bool) != (kinds[name] is bool)):
                raise DataError(f"{where}: field {name!r} is {value!r}, not {_WORDS[kinds[name]]}")
        if ("prompt" in record) == ("user" in record):
            raise DataError(f"{where}: give either 'prompt' or 'user'")
        if "example" in record and "user" not in record:
            raise DataError(f"{where}: field 'example' needs 'user'")
        settings = dict(defaults) | {name: record[name] for name in record if name in defaults}
        _check(where, record, settings, rule)
        about = {name: record[name] for name in ("id", "prompt", "user", "example") if name in record}
        example = _example(where, record, by_id) if "user" in record else None
        if example:
            about |= {"example": example.id, "reference": example.reference}
        found.append(Request({"line": number, **about}, record.get("prompt"), example, settings))
    if not found:
        raise DataError(f"{path.name}: no requests")
    return found


def _check(where: str, record: Mapping[str, Any], settings: Mapping[str, Any], rule: "Rule") -> None:
    """What `generate` would refuse when it comes to this line."""
    from dps_lens.errors import DataError, DPSLensError
    from dps_lens.heads import HeadSet
    from dps_lens.steering.rules import check_strength
    from dps_lens.steering.sampling import Sampler

    try:
        heads = HeadSet.parse(settings["heads"])
        for name in STRENGTHS:
            check_strength(name, settings[name])
        Sampler(*(settings[name] for name in SAMPLING if name != "seed"))
    except DPSLensError as error:
        raise DataError(f"{where}: {error}") from error
    if rule.needs_heads and not len(heads):
        raise DataError(f"{where}: no heads; give 'heads', or --run or --heads for all lines")
    if rule.prompt and "user" not in record:
        raise DataError(f"{where}: this rule needs prompts with a profile; give 'user' instead of 'prompt'")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    from dps_lens.errors import DataError

    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise DataError(f"there is no file {path}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path.name}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, line


def _example(where: str, record: Mapping[str, Any], users: "Mapping[str, User]") -> "Example":
    from dps_lens.errors import DataError

    user = users.get(record["user"])
    if user is None:
        raise DataError(f"{where}: field 'user' is {record['user']!r}, who is not among --users")
    examples = {example.id: example for example in user.examples}
    if "example" not in record:
        if not examples:
            raise DataError(f"{where}: field 'user' is {record['user']!r}, who has no evaluation example")
        return user.examples[-1]
    if record["example"] not in examples:
        raise DataError(f"{where}: field 'example' is {record['example']!r}; the user has {', '.join(examples)}")
    return examples[record["example"]]


class Lines:
    """JSON lines that are printed, or kept in a file that an interrupted command goes on with.

    Raises:
        RunError: the file holds lines of other requests.
    """

    def __init__(self, out: Path | None, requests: Sequence[Request], settings: Mapping[str, Any]) -> None:
        self._out, self._settings = out, settings
        self.done = self._kept(requests) if out is not None and out.exists() else 0

    def row(self, request: Request) -> dict[str, Any]:
        """What a line says of its request."""
        row = {**request.about, **self._settings, **request.settings}
        return row | {"heads": str(row["heads"])}

    def _kept(self, requests: Sequence[Request]) -> int:
        from dps_lens.errors import RunError
        from dps_lens.files import write_text

        assert self._out is not None
        # A line without its end was being written when the command was stopped, perhaps inside a character.
        *whole, torn = self._out.read_bytes().split(b"\n")
        for number, (line, request) in enumerate(zip(whole, requests, strict=False), start=1):
            row = json.loads(json.dumps(self.row(request)))
            try:
                found = dict(json.loads(line))
            except (ValueError, TypeError) as error:
                raise RunError(
                    f"{self._out}, line {number} was not written by this command; use another file"
                ) from error
            changed = [name for name, value in row.items() if found.get(name) != value]
            if changed:
                raise RunError(
                    f"{self._out}, line {number}: {changed[0]} was {found.get(changed[0])!r}, now "
                    f"{row[changed[0]]!r}; use another file, or --force to start anew"
                )
        if len(whole) > len(requests):
            raise RunError(f"{self._out} holds {len(whole)} lines for {len(requests)} requests; use another file")
        if torn:
            write_text(self._out, "".join(f"{line.decode()}\n" for line in whole))
        return len(whole)

    def write(self, request: Request, written: Mapping[str, Any]) -> None:
        """One finished request."""
        import typer

        line = json.dumps(self.row(request) | dict(written), ensure_ascii=False)
        if self._out is None:
            typer.echo(line)
            return
        append_line(self._out, line)


def append_line(path: Path, line: str) -> None:
    """Add a line to a file, which is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(f"{line}\n")
