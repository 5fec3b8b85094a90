"""Clean runs that a live page keeps, so that other heads of the same question are measured at once."""

import warnings
from collections import OrderedDict
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from dps_lens.data import Example, Prompt
from dps_lens.scoring import CleanRun, nll_run
from dps_lens.validation.curve import AblationWork

_KEPT = 12


@dataclass
class KeptRuns(AblationWork):
    """`ablation_cost` that keeps its clean runs."""

    runs: OrderedDict[Any, CleanRun] = field(default_factory=OrderedDict)

    @cached_property
    def examples(self) -> list[Example]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the other users have no examples
            return super().examples

    def clean_run(self, prompt: Prompt, condition: str, **options: Any) -> CleanRun:
        ablation, where, keep_z = (options.get(name) for name in ("ablation", "where", "keep_z"))
        # Of the same tokens, the response may begin elsewhere.
        tokens, response = tuple(prompt.tokens.tolist()), prompt.spans["response"]
        key = (tokens, response, condition, (ablation or self.settings.ablation).name, where)
        if key not in self.runs or (keep_z and self.runs[key].z is None):
            self.runs[key] = nll_run(super().clean_run(prompt, condition, **options))
            while len(self.runs) > _KEPT:
                self.runs.popitem(last=False)
        self.runs.move_to_end(key)
        return self.runs[key]
