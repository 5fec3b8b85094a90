"""Answers to what a live page is asked, each the library call that is shown beside it."""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from dps_lens.data import PromptConfig, User, build_prompt
from dps_lens.data.examples import unit_key
from dps_lens.errors import DPSLensError
from dps_lens.explorer.code import (
    Origin,
    as_command,
    as_python,
    config_as_python,
    generate_as_python,
    run_folder,
    steer_options,
)
from dps_lens.explorer.kept import KeptRuns
from dps_lens.explorer.question import ADDED_BY, STEERED_BY, Question, Refused, read_question
from dps_lens.explorer.writer import streamed, written_tokens
from dps_lens.intervene import Edit, attention_for, everywhere, find_ablation
from dps_lens.model import HookedModel, runner_of
from dps_lens.scoring import CleanRun, nll_run
from dps_lens.steering import HeadVector
from dps_lens.steering.rules import find_rule
from dps_lens.validation.effects import FULL
from dps_lens.vectors import HeadVectors
from dps_lens.work import Units

_NEXT = 8


class Asker:
    """Answers questions about a model.

    Args:
        model: a hooked model.
        users: of the page.
        config: how its prompts are built.
        origin: of the model and the users, for the lines that are offered with an answer.
        vectors: of the users, at heads; with them, rules that add them can be asked for.
    """

    def __init__(
        self,
        model: HookedModel,
        users: Sequence[User],
        config: PromptConfig,
        origin: Origin | None = None,
        vectors: HeadVectors | None = None,
    ) -> None:
        self.model, self.users, self.config, self.origin = model, tuple(users), config, origin or Origin()
        self.vectors = vectors
        self.rules = STEERED_BY + (ADDED_BY if vectors is not None else ())
        self._runs: OrderedDict[Any, CleanRun] = OrderedDict()

    def read(self, request: object) -> Question:
        """A request, checked.

        Raises:
            Refused: names the field that is missing or wrong.
        """
        return read_question(request, self.users, self.model.cfg, self.rules)

    def measure(self, asked: Question) -> Iterator[dict[str, Any]]:
        """`{"next": …}`, what the heads do to the next token; then `{"rows": …}`, what they do to the text, if there is
        one, as `ablation_cost` measures it.

        Raises:
            Refused: the prompt cannot be built.
        """
        try:
            work = self._work(asked) if asked.example.reference else None
            yield {"next": self._next(asked, work)}
            rows = self._effects(asked, work) if work is not None else []
        except DPSLensError as error:
            raise Refused("prompt", str(error)) from error
        call = (
            f"config = {config_as_python(self.config)}\n"
            "prompt = dps.build_prompt(model, example, config=config, response=False)\n"
            "with torch.no_grad():\n    plain = model(prompt.tokens[None])[0, -1].softmax(-1)\n"
            f"    with dps.ablate(model, heads, ablation={asked.ablation!r}, prompt=prompt):\n"
            "        ablated = model(prompt.tokens[None])[0, -1].softmax(-1)\n"
        )
        if work is not None:
            call += (
                f"effects = dps.ablation_cost(\n    model, asked, heads, ablation={asked.ablation!r}, n_random=0, "
                "prompt_config=config\n)\nprint(effects.to_frame())"
            )
        options = ("--heads", asked.heads, "--ablation", asked.ablation, "--kinds", "", "--n-random", 0)
        out = run_folder("asked", asked.example.user_id, asked.heads, asked.ablation)
        command = self._command("ablate", asked, *options, "--max-examples", 1, "--out", out)
        yield {"rows": rows, "python": self._python(asked, call), "command": command}

    def prepare(self, asked: Question, interrupted: Callable[[], bool]) -> Iterator[dict[str, Any]]:
        """Read the prompts that `measure` will need, one a step, until they are read or somebody else waits.

        Raises:
            Refused: a prompt cannot be built.
        """
        try:
            if asked.example.reference and not interrupted():
                for _ in self._work(asked).clean_runs(unit_key(asked.example), asked.example):
                    yield {}
                    if interrupted():
                        return
        except DPSLensError as error:
            raise Refused("prompt", str(error)) from error

    def _work(self, asked: Question) -> KeptRuns:
        """The run of `ablation_cost`."""
        return KeptRuns.of_one_set(
            self.model,
            asked.users,
            asked.heads,
            ablation=asked.ablation,
            prompt_config=self.config,
            n_random=0,
            runs=self._runs,
        )

    def _effects(self, asked: Question, work: KeptRuns) -> list[dict[str, Any]]:
        key = unit_key(asked.example)
        effects = work.collect(Units({key: work.make(key)}), {"spread": False})
        frame = effects.to_frame()
        full = frame[frame["family"] == FULL].set_index("measure")["mean"]
        edited = frame[frame["family"] != FULL].set_index("measure")["mean"]
        rows = [
            {"measure": name, "full": float(full[name]), "edited": float(edited[name])}
            for name in full.index
            if name in edited.index
        ]
        gains = [
            {"measure": name, "full": float(full[name]), "edited": float(edited[left])}
            for name, left in (("gain", "gain_left"), ("gain_other", "gain_left_other"))
            if name in full.index and left in edited.index
        ]
        used = {*full.index, "gain_left", "gain_left_other"}
        more = [{"measure": name, "value": float(value)} for name, value in edited.items() if name not in used]
        return [*rows, *gains, *more]

    @torch.inference_mode()
    def _next(self, asked: Question, work: KeptRuns | None) -> list[tuple[str, float, float]]:
        """The likeliest next tokens: text, p of the model, p with the heads ablated at the last prompt token."""
        runner, ablation = runner_of(self.model), find_ablation(asked.ablation)
        prompt = build_prompt(self.model, asked.example, config=self.config, response=False)
        last = prompt.prompt_tokens[None, -1:].to(runner.device)
        with attention_for(self.model, ablation):
            if work is not None:
                # The run that is measured has read the prompt.
                run = nll_run(next(work.clean_runs(unit_key(asked.example), asked.example))[1])
                cache, full = run.prompt_cache, run.logits[0]
            else:
                cache = runner.prefill(prompt.prompt_tokens[None, :-1].to(runner.device))
                full = runner.logits(last, prompt=cache, keep=1)[0, -1]
            with Edit(asked.heads.mask(runner.cfg)[None], ablation, everywhere, ablation.standalone("ask")).on(
                self.model
            ):
                edited = runner.logits(last, prompt=cache, keep=1)[0, -1]
        shares = [logits.float().softmax(-1).cpu() for logits in (full, edited)]
        shown = dict.fromkeys(token for share in shares for token in share.topk(_NEXT).indices.tolist())
        ordered = sorted(shown, key=lambda token: -float(shares[0][token]))
        return [(self.model.tokenizer.decode([one]), *(float(share[one]) for share in shares)) for one in ordered]

    def write(self, asked: Question) -> Iterator[dict[str, Any]]:
        """`{"text": …}` piece by piece, then `{"done": …}` with tokens, their shifts and KL.

        Raises:
            Refused: the prompt cannot be built, or the rule cannot write it.
        """
        rule = find_rule(asked.rule)
        try:
            prompt = build_prompt(self.model, asked.example, config=self.config, response=False)
            written = yield from streamed(
                self.model,
                prompt,
                heads=asked.heads if rule.needs_heads else None,
                vectors=self._vector(asked),
                rule=rule,
                gamma=asked.gamma,
                max_new_tokens=asked.length,
            )
        except Refused:
            raise
        except DPSLensError as error:
            raise Refused("prompt", str(error)) from error
        given = "heads=heads, " * rule.needs_heads
        given += "vectors=vectors.only(heads)[example.user_id], " * rule.needs_vectors
        call = generate_as_python(self.config, asked.rule, asked.gamma, asked.length, given)
        options = steer_options(asked.heads, asked.rule, asked.gamma, asked.length)
        command = self._command("steer", asked, *options) if not rule.needs_vectors else ""
        yield {"done": written_tokens(written), "python": self._python(asked, call), "command": command}

    def _vector(self, asked: Question) -> HeadVector | None:
        """The asker's own, at the heads that are asked about.

        Raises:
            Refused: the asker has none, or a head has none.
        """
        if self.vectors is None or not find_rule(asked.rule).needs_vectors:
            return None
        if asked.example.user_id not in self.vectors:
            raise Refused("rule", f"there is no vector of {asked.example.user_id!r}; choose a user of the page")
        if missing := [str(head) for head in asked.heads if head not in self.vectors.heads]:
            raise Refused("heads", f"{missing[0]} has no vector; there are some at {self.vectors.heads}")
        return self.vectors.only(asked.heads)[asked.example.user_id]

    def _python(self, asked: Question, call: str) -> str:
        return as_python(self.origin, asked.code, call)

    def _command(self, name: str, asked: Question, *options: object) -> str:
        return as_command(self.origin, name, asked.newest, options, self.config) if asked.newest else ""
