"""What `dps-lens evaluate` is asked for: a YAML file, and what the command line changes in it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from dps_lens.cli.checks import words
from dps_lens.cli.options import METHODS
from dps_lens.errors import EvaluationError


class EvaluateConfig(BaseModel):
    """Everything that decides a benchmark table."""

    model_config = ConfigDict(extra="forbid")

    model: str = "smollm2-135m"
    device: str | None = None
    dtype: str = "auto"
    users: str = "probe"
    outputs: Path | None = None
    max_users: int | None = Field(None, ge=1)
    strict: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    run: Path | None = None
    methods: tuple[str, ...] = METHODS
    metrics: tuple[str, ...] = ()
    strengths: tuple[float, ...] = (0.25, 0.5, 1.0)
    ks: tuple[int, ...] = (10,)
    layers: tuple[int, ...] | None = None
    choose_on: int = Field(1, ge=0)
    max_examples: int | None = Field(None, ge=1)
    max_new_tokens: int | None = Field(None, ge=1)
    baseline: str | None = None
    seed: int = 0

    @field_validator("methods", "metrics", "strengths", "ks", "layers", mode="before")
    @classmethod
    def _split(cls, value: object) -> Any:
        """Comma-separated, as on the command line."""
        return words(value) if isinstance(value, str) else value

    def as_yaml(self) -> str:
        """As a file that `read_config` reads."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def read_config(path: Path | None, given: Mapping[str, Any]) -> EvaluateConfig:
    """A configuration file with the options that were given on the command line in place of its own.

    Raises:
        EvaluationError: the file is missing, is no YAML mapping, or a field is unknown or malformed; names them.
    """
    values: Any = {}
    if path is not None:
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except OSError as error:
            raise EvaluationError(f"evaluate: {path} cannot be read ({error.strerror})") from error
        except yaml.YAMLError as error:
            raise EvaluationError(f"{path.name}: not valid YAML ({' '.join(str(error).split())})") from error
        if not isinstance(values, dict):
            raise EvaluationError(f"{path.name}: expected fields such as 'methods: [rag, cad]'")
    try:
        return EvaluateConfig(**{str(name): value for name, value in values.items()} | dict(given))
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        known = f"; fields are {', '.join(EvaluateConfig.model_fields)}" if first["type"] == "extra_forbidden" else ""
        where = path.name if path is not None and name.split(".")[0] not in given else "evaluate"
        raise EvaluationError(f"{where}: {name}: {first['msg']}{known}") from None
