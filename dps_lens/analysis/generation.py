"""What a model writes without the top heads of a family: ROUGE-L or accuracy on held-out examples."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from dps_lens.analysis.effects import FULL
from dps_lens.analysis.intervals import crossed_interval, interval
from dps_lens.analysis.rankings import Family, Select
from dps_lens.analysis.set_sweep import SetSweep
from dps_lens.data import Example, PromptConfig, User
from dps_lens.families import draw_seed, random_heads
from dps_lens.heads import HeadSet
from dps_lens.model import HookedModel
from dps_lens.runs import RunFolder
from dps_lens.steering import generate

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class AblatedTexts:
    """Greedy answers with nothing, chosen heads or random heads ablated.

    Attributes:
        texts: a frame with one row an example and set: `user`, `example`, `family`, `draw` (−1 for the chosen
            heads), `text`, `reference`, `score` (ROUGE-L F-measure, or 1 for the right answer in closed tasks).
        manifest: settings.
    """

    texts: "pandas.DataFrame"
    manifest: dict[str, Any] = field(default_factory=dict)

    def to_frame(self, level: float = 0.95) -> "pandas.DataFrame":
        """One row a family: `mean` score with its interval over users, `lost` against the full model (paired),
        `control` (mean of the random sets) and `difference` in what is lost from the control."""
        import pandas as pd

        table = self.texts.pivot_table(index="user", columns=["family", "draw"], values="score", sort=False)
        full = table[(FULL, -1)].to_numpy()
        rows = [{"family": FULL, **interval(full, level)}]
        for family in self.texts["family"].unique():
            if family == FULL:
                continue
            chosen = table[(family, -1)].to_numpy()
            lost = interval(full - chosen, level)
            row = {"family": family, **interval(chosen, level), **{_name("lost", n): v for n, v in lost.items()}}
            draws = [draw for name, draw in table.columns if name == family and draw >= 0]
            if draws:
                controls = np.stack([table[(family, draw)].to_numpy() for draw in draws])
                difference = crossed_interval(controls - chosen, level)
                row |= {"control": float(controls.mean()), **{_name("difference", n): v for n, v in difference.items()}}
            rows.append(row)
        return pd.DataFrame(rows)


def _name(column: str, part: str) -> str:
    return column if part == "mean" else f"{column}_{part}"


def ablated_generation(
    model: HookedModel,
    users: Sequence[User],
    families: Mapping[str, Family],
    *,
    k: int = 10,
    n_random: int = 3,
    select: Select | Mapping[str, Select] = "global",
    exclude: Mapping[str, HeadSet] | None = None,
    max_examples: int | None = None,
    max_new_tokens: int | None = None,
    prompt: PromptConfig | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    force: bool = False,
    progress: bool = True,
) -> AblatedTexts:
    """Answer evaluation examples greedily, own profile shown, without the top K heads of every family.

    The task's own metric: accuracy where answers come from a closed set, else ROUGE-L (F-measure, no stemmer,
    as in LaMP). Other arguments as in `ablation_curve`.

    Args:
        k: heads of each family.
        n_random: layer-matched random sets for each family, on every example.
        max_new_tokens: by default what the task needs.

    Raises:
        ScoreError: as `ablation_curve`.
    """
    import pandas as pd

    sets = SetSweep.of(
        "ablated_generation",
        model,
        users,
        families,
        (k,),
        prompt=prompt,
        n_random=n_random,
        select=select,
        exclude=exclude,
        max_examples=max_examples,
        seed=seed,
    )
    manifest = sets.fingerprint() | {"max_new_tokens": max_new_tokens}
    folder = RunFolder(out, manifest, force=force) if out is not None else None

    def write(_: int, example: Example) -> dict[str, Tensor]:
        heads = _sets_of(sets, example)[1]
        written: Any = generate(
            model,
            [sets.build(example, "own")] * len(heads),
            heads=heads,
            gamma=[-1.0 if len(chosen) else 0.0 for chosen in heads],
            ablation=sets.ablation,
            positions=sets.positions,
            max_new_tokens=max_new_tokens or example.task.max_new_tokens,
        )
        return {str(index): tokens for index, tokens in enumerate(written.tokens)}

    rows = []
    for example, unit in zip(sets.examples, sets.units(folder, write, "writing", progress), strict=True):
        for index, (family, draw) in enumerate(_sets_of(sets, example)[0]):
            text = model.tokenizer.decode(unit[str(index)], skip_special_tokens=True).strip()
            about = {"user": example.user_id, "example": example.id, "family": family, "draw": draw}
            rows.append(about | {"text": text, "reference": example.reference, "score": score_text(example, text)})
    return AblatedTexts(pd.DataFrame(rows), manifest)


def _sets_of(sets: SetSweep, example: Example) -> tuple[list[tuple[str, int]], list[HeadSet]]:
    labels, heads = [(FULL, -1)], [HeadSet()]
    for family, by_user in sets.ranked[0].items():
        (chosen,) = by_user[example.user_id]
        labels.append((family, -1))
        heads.append(chosen)
        for draw in range(sets.n_random):
            labels.append((family, draw))
            heads.append(random_heads(sets.model, chosen, match="nearest", seed=draw_seed(sets.seed, draw)))
    return labels, heads


def score_text(example: Example, text: str) -> float:
    """ROUGE-L of an answer, or 1 for the right answer of a closed task."""
    if example.task.closed:
        return float(text.strip().casefold() == example.reference.strip().casefold())
    from dps_lens.evaluation.metrics import rouge

    return rouge(example.reference, text)["ROUGE-L"]
