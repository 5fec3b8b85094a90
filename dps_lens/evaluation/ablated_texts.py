"""What a model writes without the top heads of a family, by the task's own metric on held-out examples."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from torch import Tensor

from dps_lens.data import Example, PromptConfig, User
from dps_lens.evaluation.metrics import METRICS, metrics_of, score_text
from dps_lens.heads import HeadSet
from dps_lens.literals import Select
from dps_lens.model import HookedModel
from dps_lens.result import Result
from dps_lens.selection import HeadSource, random_sets
from dps_lens.stats.intervals import columns, crossed_interval, interval
from dps_lens.steering import DecodeConfig, generate
from dps_lens.validation.effects import FULL
from dps_lens.validation.work import HeldOutConfig, HeldOutWork
from dps_lens.work import Engine, Run, RunConfig

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, eq=False, repr=False)
class AblatedTexts(Result):
    """Greedy answers with nothing, chosen heads or random heads ablated.

    Attributes:
        texts: a frame with one row an example and set: `user`, `example`, `family`, `draw` (−1 for the chosen
            heads), `text`, `reference`, `score` by the task's first metric.
        manifest: settings; `metric` names it.
    """

    stem: ClassVar[str] = "texts"

    texts: "pandas.DataFrame"
    manifest: dict[str, Any] = field(default_factory=dict)

    def summary(self) -> str:
        return f"{len(self.texts)} answers, {', '.join(self.texts['family'].unique())}, by {self.manifest['metric']}"

    def to_frame(self, level: float = 0.95) -> "pandas.DataFrame":
        """One row a family: `mean` score with its interval over users, `lost` against the full model (paired),
        `control` (mean of the random sets) and `difference` in what is lost from the control."""
        import pandas as pd

        sign = METRICS[self.manifest["metric"]].sign
        table = self.texts.pivot_table(index="user", columns=["family", "draw"], values="score", sort=False)
        full = table[(FULL, -1)].to_numpy()
        rows: list[dict[str, Any]] = [{"family": FULL, **interval(full, level)}]
        for family in (name for name in self.texts["family"].unique() if name != FULL):
            chosen = table[(family, -1)].to_numpy()
            row = {"family": family, **interval(chosen, level)}
            row |= columns("lost", interval(sign * (full - chosen), level))
            draws = [draw for name, draw in table.columns if name == family and draw >= 0]
            if draws:
                controls = np.stack([table[(family, draw)].to_numpy() for draw in draws])
                row |= {"control": float(controls.mean())}
                row |= columns("difference", crossed_interval(sign * (controls - chosen), level))
            rows.append(row)
        return pd.DataFrame(rows)


def ablated_generation(
    model: HookedModel,
    users: Sequence[User],
    families: Mapping[str, HeadSource],
    *,
    k: int = 10,
    n_random: int = 3,
    select: Select | Mapping[str, Select] = "global",
    max_examples: int | None = None,
    max_new_tokens: int | None = None,
    prompt_config: PromptConfig | None = None,
    held_out_config: HeldOutConfig | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    engine: Engine | None = None,
    run_config: RunConfig | None = None,
) -> AblatedTexts:
    """Answer evaluation examples greedily, own profile shown, without the top K heads of every family.

    Answers are scored by the task's first metric, as `evaluate` scores them. Other arguments as in `ablation_curve`.

    Args:
        k: heads of each family.
        n_random: layer-matched random sets for each family, on every example.
        max_new_tokens: by default what the task needs.

    Raises:
        ScoreError: as `ablation_curve`.
        InterventionError: the heads were scored with an ablation that cannot act while text is written.
    """
    run = Run(model, AblatedTexts, out, engine, run_config)
    work = TextWork.of(
        "ablated_generation",
        model,
        users,
        families,
        (k,),
        prompt_config=prompt_config,
        config=held_out_config,
        n_random=n_random,
        select=select,
        max_examples=max_examples,
        seed=seed,
        max_new_tokens=max_new_tokens,
    )
    run.open(work.fingerprint)
    work.fit(run)
    units = run.units(work, list(work.by_key), "writing")
    return run.keep(AblatedTexts(work.table(units.made), run.manifest))


@dataclass
class TextWork(HeldOutWork):
    """The run of `ablated_generation`."""

    uses: ClassVar[tuple[str, ...]] = ("ablation", "positions", "prompt_config")

    max_new_tokens: int | None = None

    @cached_property
    def metric(self) -> str:
        return metrics_of(self.examples[0].task, [example.reference for example in self.examples])[0].name

    def sets(self, example: Example) -> tuple[list[tuple[str, int]], list[HeadSet]]:
        """Family and draw of every answer, and the heads that it is written without."""
        labels, heads = [(FULL, -1)], [HeadSet()]
        for family, by_user in self.ranked[0].items():
            (chosen,) = by_user[example.user_id]
            labels += [(family, draw) for draw in range(-1, self.n_random)]
            heads += [chosen, *random_sets(self.model, chosen, self.n_random, self.seed)]
        return labels, heads

    def make(self, key: str, given: object = None) -> dict[str, Tensor]:
        example = self.by_key[key]
        _, heads = self.sets(example)
        written = generate(
            self.model,
            [self.build(example, "own")] * len(heads),
            heads=heads,
            gamma=[-1.0 if len(chosen) else 0.0 for chosen in heads],
            positions=self.settings.positions,
            max_new_tokens=self.max_new_tokens or example.task.max_new_tokens,
            decode_config=DecodeConfig(ablation=self.ablation_in("own")),
        )
        return {str(index): tokens for index, tokens in enumerate(written.tokens)}

    def table(self, made: Mapping[str, Mapping[str, Tensor]]) -> "pandas.DataFrame":
        """Answers with their scores."""
        import pandas as pd

        rows = []
        for key, unit in made.items():
            example = self.by_key[key]
            for index, (family, draw) in enumerate(self.sets(example)[0]):
                text = self.model.tokenizer.decode(unit[str(index)], skip_special_tokens=True).strip()
                about = {"user": example.user_id, "example": example.id, "family": family, "draw": draw}
                score = score_text([METRICS[self.metric]], example.reference, text)[self.metric]
                rows.append(about | {"text": text, "reference": example.reference, "score": score})
        return pd.DataFrame(rows)

    def fingerprint(self) -> dict[str, Any]:
        return super().fingerprint() | {"max_new_tokens": self.max_new_tokens, "metric": self.metric}
