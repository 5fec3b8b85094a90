"""What the experiments share: a config file, users and scores, and a run folder that says what was found.

A run folder holds `config.yaml`, `manifest.json`, `tables/*.csv`, `verdict.json` and `results.md`. Scores are kept in
`scores`, one folder a setting, so that experiments with equal settings compute them once. Experiments in steps make
those that the config names; what is finished is read, so that several runs can share the work and one gather it.
"""

import argparse
import hashlib
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

import pandas as pd
import yaml
from pydantic import BaseModel, ConfigDict

import dps_lens as dps
from dps_lens.data.retrieval import RetrievalMethod
from dps_lens.errors import DataError
from dps_lens.files import write_json, write_text
from dps_lens.model import describe_model
from dps_lens.selection import undefined_of
from dps_lens.work import Engine
from experiments.lib.tables import markdown

Outcome: TypeAlias = Literal["supported", "not supported", "undecided"]
DATA, MOST_ROWS = "DPS_LENS_DATA", 100


class Prompts(BaseModel):
    """How prompts are built; short by default, as the sweeps' time grows with their responses."""

    model_config = ConfigDict(extra="forbid")

    items: int = 4
    profile_tokens: int = 128
    task_tokens: int | None = 64
    response_tokens: int | None = 10
    retrieval: RetrievalMethod = "bm25"
    seed: int = 0

    def config(self, **changes: Any) -> dps.PromptConfig:
        return dps.PromptConfig(**self.model_dump() | changes)


LONG = Prompts(items=6, profile_tokens=256, task_tokens=256, response_tokens=48)
"""Of the experiments that take hours."""


SCORES: dict[str, dict[str, Any]] = {
    "zero-PCS": {"ablation": "zero", "against": "no_profile", "method": "exact"},
    "integrated": {"ablation": "patch", "against": "other_user", "method": "integrated"},
}
"""What heads are scored by: the PCS by zero ablation, own profile minus none, or integrated patches."""


class Config(BaseModel):
    """What every experiment is asked for; each adds its own fields."""

    model_config = ConfigDict(extra="forbid")

    model: str = "smollm2-135m"
    users: str = "govblog/lamp4_questions.json"
    max_users: int | None = None
    max_examples: int = 4
    prompt: Prompts = Prompts()
    score: Literal["zero-PCS", "integrated"] = "zero-PCS"
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
    """Tables by name, one claim a hypothesis, and tables of this machine's times, which no other run repeats."""

    tables: Mapping[str, pd.DataFrame]
    claims: Sequence[Claim]
    times: Mapping[str, pd.DataFrame] = field(default_factory=dict)


def decide(low: float, high: float, above: float = 0.0) -> Outcome:
    """Whether an interval lies above a bound, below it, or neither."""
    if low > above:
        return "supported"
    return "not supported" if high <= above else "undecided"


def above_zero(hypothesis: str, found: Mapping[str, Any]) -> Claim:
    """A claim that is decided by whether an interval lies above 0."""
    measured = {name: float(found[name]) for name in ("mean", "low", "high")}
    return Claim(hypothesis, "the interval lies above 0", measured, decide(measured["low"], measured["high"]))


def all_above_zero(hypothesis: str, found: Mapping[str, Mapping[str, Any]]) -> Claim:
    """A claim that needs every interval above 0; one that lies below decides against it."""
    parts = {name: above_zero(name, row) for name, row in found.items()}
    outcomes = {part.outcome for part in parts.values()}
    outcome: Outcome = "supported" if outcomes == {"supported"} else "undecided"
    if "not supported" in outcomes:
        outcome = "not supported"
    measured = {name: part.measured for name, part in parts.items()}
    return Claim(hypothesis, "every interval lies above 0", measured, outcome)


class Lab:
    """The model, users and scores of a config."""

    def __init__(self, config: Config, out: Path) -> None:
        self.config, self.out = config, out
        self.read: dict[str, list[str]] = {}
        self.undefined: dict[str, str] = {}

    @cached_property
    def model(self) -> dps.HookedModel:
        return dps.load_model(self.config.model)

    def users(self, source: str | None = None, *, max_users: int | None = None) -> list[dps.User]:
        """Users with discovery examples, of a built-in set, a file, or a file of the development data."""
        source = source or self.config.users
        found = dps.load_users(located(source), max_users=max_users or self.config.max_users)
        found = [user for user in found if user.discovery_examples()]
        self.read[source] = [user.id for user in found]
        return found

    def scores(self, users: Sequence[dps.User], label: str = "scores", **settings: Any) -> dps.HeadScores:
        """`score_heads` as the config's `score` says, where nothing else is asked for; kept where every experiment
        with these settings finds it."""
        given = dict(SCORES[self.config.score])
        given |= {"prompt_config": self.config.prompt.config(), "max_examples": self.config.max_examples}
        given |= settings
        inputs = [[user.id, [example.input for example in user.examples]] for user in users]
        key = json.dumps([str(self.config.model), given, inputs], sort_keys=True, default=asdict)
        folder = self.config.scores / f"{label}-{hashlib.sha256(key.encode()).hexdigest()[:10]}"
        return dps.score_heads(self.model, users, **given, out=folder)

    def references(self, kinds: Sequence[str], engine: Engine | None = None) -> dict[str, dps.HeadScores]:
        """Reference heads that the model shows, from the user's cache where they are known."""
        found = dps.reference_heads(self.model, kinds=tuple(kinds), engine=engine)
        self.undefined |= undefined_of(found)
        return {name: scores for name, scores in found.items() if name not in self.undefined}


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
            "undefined": lab.undefined,
            "version": dps.__version__,
            "config": lab.config.model_dump(mode="json"),
        },
    )
    parts = [about.strip()]
    for folder, tables in (("tables", findings.tables), ("times", findings.times)):
        for name, frame in tables.items():
            write_text(out / folder / f"{name}.csv", frame.to_csv(index=False))
            few = frame if len(frame) <= MOST_ROWS else frame.head(MOST_ROWS)
            parts.append(f"## {name}\n\n{markdown(few)}" + ("" if len(few) == len(frame) else "\n\n…"))
    write_json(out / "verdict.json", [asdict(claim) for claim in findings.claims])
    parts.append("## verdict\n\n" + markdown(verdicts(findings.claims)))
    write_text(out / "results.md", "\n\n".join(parts) + "\n")


def verdicts(claims: Sequence[Claim]) -> pd.DataFrame:
    return pd.DataFrame([{"hypothesis": c.hypothesis, "rule": c.rule, "outcome": c.outcome} for c in claims])
