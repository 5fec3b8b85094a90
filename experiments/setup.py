"""What the experiments share: a config file, users and scores, and a run folder that says what was found.

A run folder holds `config.yaml`, `manifest.json`, `tables/*.csv`, `verdict.json` and `results.md`. Scores are kept in
`scores`, one folder a setting, so that experiments with equal settings compute them once.
"""

import argparse
import hashlib
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

import pandas as pd
import yaml
from pydantic import BaseModel, ConfigDict

import dps_lens as dps
from dps_lens.data import User
from dps_lens.errors import DataError
from dps_lens.files import write_json, write_text
from dps_lens.model import HookedModel, describe_model
from experiments.tables import cell, table

Outcome: TypeAlias = Literal["supported", "not supported", "undecided"]
DATA, MOST_ROWS = "DPS_LENS_DATA", 100


class Prompts(BaseModel):
    """How prompts are built; short by default, as the sweeps' time grows with their responses."""

    model_config = ConfigDict(extra="forbid")

    items: int = 4
    profile_tokens: int = 128
    task_tokens: int | None = 64
    response_tokens: int | None = 10
    retrieval: Literal["bm25", "recency", "random"] = "bm25"
    seed: int = 0

    def config(self, **changes: Any) -> dps.PromptConfig:
        return dps.PromptConfig(**self.model_dump() | changes)


class Config(BaseModel):
    """What every experiment is asked for; each adds its own fields."""

    model_config = ConfigDict(extra="forbid")

    model: str = "smollm2-135m"
    users: str = "govblog/lamp4_questions.json"
    max_users: int | None = None
    max_examples: int = 4
    prompt: Prompts = Prompts()
    scores: Path = Path("runs/scores")
    seed: int = 0


@dataclass(frozen=True)
class Claim:
    """A hypothesis, the numbers that its decision rule read, and how it came out."""

    hypothesis: str
    rule: str
    measured: Mapping[str, Any]
    outcome: Outcome


@dataclass(frozen=True)
class Findings:
    """Tables by name and one claim a hypothesis."""

    tables: Mapping[str, pd.DataFrame]
    claims: Sequence[Claim]


def decide(low: float, high: float, above: float = 0.0) -> Outcome:
    """Whether an interval lies above a bound, below it, or neither."""
    if low > above:
        return "supported"
    return "not supported" if high <= above else "undecided"


class Lab:
    """The model, users and scores of a config."""

    def __init__(self, config: Config, out: Path) -> None:
        self.config, self.out = config, out
        self.read: dict[str, list[str]] = {}

    @cached_property
    def model(self) -> HookedModel:
        return dps.load_model(self.config.model)

    def users(self, source: str | None = None, *, max_users: int | None = None) -> list[User]:
        """Users with discovery examples, of a built-in set, a file, or a file of the development data."""
        source = source or self.config.users
        found = dps.load_users(located(source), max_users=max_users or self.config.max_users)
        found = [user for user in found if user.discovery_examples()]
        self.read[source] = [user.id for user in found]
        return found

    def scores(self, users: Sequence[User], label: str = "scores", **settings: Any) -> dps.HeadScores:
        """`score_heads`, kept where every experiment with these settings finds it."""
        settings = {"prompt": self.config.prompt.config(), "max_examples": self.config.max_examples} | settings
        named = {name: value.to_dict() if name == "prompt" else value for name, value in settings.items()}
        inputs = [[user.id, [example.input for example in user.examples]] for user in users]
        key = json.dumps([str(self.config.model), named, inputs], sort_keys=True)
        folder = self.config.scores / f"{label}-{hashlib.sha256(key.encode()).hexdigest()[:10]}"
        return dps.score_heads(self.model, users, **settings, out=folder)

    def references(self, kinds: Sequence[str]) -> dict[str, dps.HeadScores]:
        """Reference heads, from the user's cache where they are known."""
        return dps.reference_heads(self.model, kinds=tuple(kinds))


def located(source: str) -> str:
    """A path of the development data as one of this machine; anything else as it is."""
    beside = Path(os.environ.get(DATA, "")) / source
    if source == "probe" or Path(source).is_file() or not source.endswith((".json", ".jsonl")):
        return source
    if os.environ.get(DATA) and beside.is_file():
        return str(beside)
    raise DataError(f"there is no file {source!r}, also not under ${DATA}; set ${DATA}, or 'users: probe' in a config")


C = TypeVar("C", bound=Config)


def main(
    name: str, about: str, kind: type[C], measure: Callable[[C, Lab], Findings], given: Sequence[str] | None = None
) -> None:
    """Read the config, measure, and write what was found."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="YAML; fields are those of the printed config.yaml")
    parser.add_argument("--out", type=Path, default=Path("runs") / name)
    arguments = parser.parse_args(given)
    warnings.filterwarnings("ignore", category=FutureWarning)
    values = yaml.safe_load(arguments.config.read_text(encoding="utf-8")) if arguments.config else {}
    config, begun = kind(**values or {}), time.monotonic()
    lab = Lab(config, arguments.out)
    findings = measure(config, lab)
    write(findings, lab, about)
    for claim in findings.claims:
        print(f"{claim.outcome}: {claim.hypothesis}")
    print(f"{arguments.out}/results.md, after {(time.monotonic() - begun) / 60:.1f} minutes", file=sys.stderr)


def write(findings: Findings, lab: Lab, about: str) -> None:
    """The run folder; equal findings give equal files."""
    out = lab.out
    write_text(out / "config.yaml", yaml.safe_dump(lab.config.model_dump(mode="json"), sort_keys=False))
    write_json(
        out / "manifest.json",
        {
            "model": describe_model(lab.model),
            "users": lab.read,
            "version": dps.__version__,
            "config": lab.config.model_dump(mode="json"),
        },
    )
    parts = [about.strip()]
    for name, frame in findings.tables.items():
        write_text(out / "tables" / f"{name}.csv", frame.to_csv(index=False))
        few = frame if len(frame) <= MOST_ROWS else frame.head(MOST_ROWS)
        parts.append(f"## {name}\n\n{markdown(few)}" + ("" if len(few) == len(frame) else "\n\n…"))
    write_json(out / "verdict.json", [asdict(claim) for claim in findings.claims])
    parts.append("## verdict\n\n" + markdown(verdicts(findings.claims)))
    write_text(out / "results.md", "\n\n".join(parts) + "\n")


def verdicts(claims: Sequence[Claim]) -> pd.DataFrame:
    return pd.DataFrame([{"hypothesis": c.hypothesis, "rule": c.rule, "outcome": c.outcome} for c in claims])


def markdown(frame: pd.DataFrame) -> str:
    """A table in which bounds stand in brackets behind their value."""
    bounds = {column for column in frame.columns if column in ("low", "high") or column.endswith(("_low", "_high"))}
    shown = [column for column in frame.columns if column not in bounds]
    lines = [[_shown(row, column) for column in shown] for row in frame.to_dict("records")]
    return table(shown, lines)


def _shown(row: Mapping[Any, Any], column: str) -> str:
    value = row[column]
    if not isinstance(value, float):
        return str(value)
    # p-values by permutation need a digit more than effects do not.
    return cell(row, column, 4 if column == "p" or column.startswith("p ") else 3)
