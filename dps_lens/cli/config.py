"""What `dps-lens evaluate` is asked for: a YAML file, and what the command line changes in it."""

import reprlib
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from dps_lens.cli.checks import words
from dps_lens.cli.options import METHODS
from dps_lens.errors import EvaluationError, reason
from dps_lens.files import read_text

# A number in a file is a number: neither "5", nor true, nor .nan.
Number: TypeAlias = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Whole: TypeAlias = Annotated[int, Field(strict=True)]


class EvaluateConfig(BaseModel):
    """Everything that decides a benchmark table."""

    model_config = ConfigDict(extra="forbid")

    model: str = "smollm2-135m"
    device: str | None = None
    dtype: str = "auto"
    users: str = "probe"
    outputs: Path | None = None
    max_users: Whole | None = Field(None, ge=1)
    strict: bool = False
    pairs: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    run: Path | None = None
    methods: tuple[str, ...] = METHODS
    metrics: tuple[str, ...] = ()
    strengths: tuple[Number, ...] = (0.25, 0.5, 1.0)
    ks: tuple[Whole, ...] = (10,)
    layers: tuple[Whole, ...] | None = None
    choose_on: Whole = Field(1, ge=0)
    max_examples: Whole | None = Field(None, ge=1)
    max_new_tokens: Whole | None = Field(None, ge=1)
    baseline: str | None = None
    seed: Whole = 0

    @field_validator("methods", "metrics", mode="before")
    @classmethod
    def _split(cls, value: object) -> Any:
        """Comma-separated, as on the command line."""
        return words(value) if isinstance(value, str) else value

    @field_validator("strengths", "ks", "layers", mode="before")
    @classmethod
    def _split_numbers(cls, value: object) -> Any:
        return list(map(_number, words(value))) if isinstance(value, str) else value

    def as_yaml(self) -> str:
        """As a file that `read_config` reads."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _number(word: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            continue
    return word


def read_config(path: Path | None, given: Mapping[str, Any]) -> EvaluateConfig:
    """A configuration file with the options that were given on the command line in place of its own.

    Raises:
        EvaluationError: the file is missing, is no YAML mapping, or a field is unknown or malformed; names them.
    """
    values = _read(path) if path is not None else {}
    try:
        return EvaluateConfig(**{str(name): value for name, value in values.items()} | dict(given))
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])[:60]
        known = f"; fields are {', '.join(EvaluateConfig.model_fields)}" if first["type"] == "extra_forbidden" else ""
        where = path.name if path is not None and name.split(".")[0] not in given else "evaluate"
        found = f", found {reprlib.repr(first['input'])}" if isinstance(first["input"], (str, int, float)) else ""
        raise EvaluationError(f"{where}: {name}: {first['msg']}{found}{known}") from None


def _read(path: Path) -> dict[Any, Any]:
    text = read_text(path, EvaluationError)
    try:
        values = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise EvaluationError(f"{path.name}: not valid YAML ({reason(error)})") from error
    except (ValueError, RecursionError, OverflowError) as error:
        raise EvaluationError(f"{path.name}: holds what no setting is ({reason(error)})") from error
    if values is not None and not isinstance(values, dict):
        raise EvaluationError(f"{path.name}: expected fields such as 'methods: [rag, cad]'")
    return values or {}


class _Loader(yaml.SafeLoader):
    """Plain values only, each under a name of its own; without aliases, which make a short file a huge one."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"line {self.peek_event().start_mark.line + 1}: aliases (*name) are not read")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        found = super().construct_mapping(node, deep)
        if len(found) < len(node.value):
            raise yaml.YAMLError(f"line {node.start_mark.line + 1}: a name stands twice")
        return found
