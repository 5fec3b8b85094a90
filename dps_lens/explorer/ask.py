"""Questions to a live page: any prompt, profile and heads; answered as the library call that is shown beside."""

import math
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from dps_lens.checks import check_number, check_whole
from dps_lens.data import Document, Example, Prompt, PromptConfig, User, build_prompt
from dps_lens.data.examples import unit_key
from dps_lens.data.tasks import TASKS
from dps_lens.errors import DPSLensError, SteeringError
from dps_lens.explorer.code import (
    Origin,
    as_command,
    as_python,
    config_as_python,
    example_as_python,
    generate_as_python,
    run_folder,
    steer_options,
)
from dps_lens.heads import HeadSet
from dps_lens.intervene import Edit, attention_for, everywhere, find_ablation
from dps_lens.model import HookedModel, runner_of
from dps_lens.scoring import CleanRun, nll_run
from dps_lens.steering import DecodeConfig, Generation, HeadVector, generate
from dps_lens.steering.rules import RULES, find_rule
from dps_lens.validation.curve import AblationWork
from dps_lens.validation.effects import FULL
from dps_lens.vectors import HeadVectors
from dps_lens.work import Units

ABLATED_BY = ("zero", "uniform")
STEERED_BY = tuple(
    name for name, rule in RULES.items() if rule.takes_gamma and not rule.needs_vectors and not rule.patched
)
ADDED_BY = ("head_vector", "head_vector+dps")
PASTED = "you"
"""The user whose documents were pasted."""

_MOST_LETTERS, _MOST_TOKENS, _MOST_GAMMA = 100_000, 512, 1000
_NEXT, _ALTERNATIVES = 8, 3
_KEPT_RUNS = 12


class Refused(SteeringError):
    """A question that cannot be answered.

    Attributes:
        field: of the form, that is to be mended.
    """

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field, self.reason = field, reason


@dataclass(frozen=True)
class Question:
    """What is asked.

    Attributes:
        users: as `ablation_cost` takes them: the asker with one evaluation example, the others with none.
        example: that is asked about; its reference is empty where no text is to be measured.
        heads: that are ablated, patched or steered with.
        ablation: what is done to them.
        rule: of `generate`, to write with.
        gamma: its strength.
        length: of a written text, in tokens.
        code: lines of Python that make `users`, `example` and `heads`.
        newest: of the page's users, who asks, where it is the user's newest evaluation example that is asked about.
    """

    users: tuple[User, ...]
    example: Example
    heads: HeadSet
    ablation: str
    rule: str
    gamma: float
    length: int
    code: str
    newest: User | None


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
        if not isinstance(request, dict):
            raise Refused("prompt", "send a JSON object")
        texts = {name: _text(request, name) for name in ("user", "prompt", "text", "documents", "heads")}
        heads = self._heads(texts["heads"])
        ablation, rule = _one_of(request, "ablation", ABLATED_BY), _one_of(request, "rule", self.rules)
        gamma = _number(request, "gamma")
        length = request.get("length", 32)
        try:
            check_whole(SteeringError, "length", length, least=1, most=_MOST_TOKENS)
        except SteeringError as error:
            raise Refused("length", str(error).removeprefix("length ")) from error
        if not texts["prompt"].strip():
            raise Refused("prompt", "is empty; write what the model is asked")
        users, example, code = self._asked(texts)
        code += f"\nheads = dps.HeadSet.parse({str(heads)!r})"
        newest = next((one for one in self.users if one.examples and one.examples[-1] is example), None)
        return Question(users, example, heads, ablation, rule, gamma, length, code, newest)

    def _heads(self, names: str) -> HeadSet:
        try:
            heads = HeadSet.parse(names)
            heads.mask(self.model.cfg)
        except DPSLensError as error:
            raise Refused("heads", str(error)) from error
        if not len(heads):
            raise Refused("heads", "none are named; click cells of the map, or write names such as L12H3,L4H0")
        return heads

    def _asked(self, texts: Mapping[str, str]) -> tuple[tuple[User, ...], Example, str]:
        """The users of a call, the example, and lines that make them."""
        prompt, text = texts["prompt"].strip(), texts["text"].strip()
        if texts["user"]:
            asker = next((one for one in self.users if one.id == texts["user"]), None)
            if asker is None:
                raise Refused("user", f"{texts['user']!r:.80} is not on this page")
            users = self.users
            same = (one for one in asker.examples if (one.input.strip(), one.reference.strip()) == (prompt, text))
            example = next(same, None)
            if example is not None:
                code = example_as_python(asker.id, example.id)
            else:
                example = Example("asked", asker.id, asker.task, prompt, text, asker.history)
                code = (
                    f"asker = next(one for one in users if one.id == {asker.id!r})\n"
                    f'example = dps.Example("asked", asker.id, asker.task, {prompt!r}, {text!r}, asker.history)'
                )
        else:
            documents = [part.strip() for part in re.split(r"\n\s*\n", texts["documents"]) if part.strip()]
            history = tuple(Document(str(place), {"text": one}) for place, one in enumerate(documents))
            example = Example("asked", PASTED, TASKS["questions"], prompt, text, history)
            if not len(example.showable):
                raise Refused(
                    "documents", "hold nothing but what is asked; paste earlier texts, blank lines between them"
                )
            users = (User(PASTED, TASKS["questions"], history, (example,)),)
            code = (
                "from dps_lens.data.tasks import TASKS\n\n"
                f"texts = {documents!r}\n"
                'history = tuple(dps.Document(str(place), {"text": one}) for place, one in enumerate(texts))\n'
                f'example = dps.Example("asked", {PASTED!r}, TASKS["questions"], {prompt!r}, {text!r}, history)\n'
                f'users = [dps.User({PASTED!r}, TASKS["questions"], history, (example,))]'
            )
        users = tuple(replace(one, examples=(example,) if one.id == example.user_id else ()) for one in users)
        code += "\nasked = [replace(one, examples=(example,) if one.id == example.user_id else ()) for one in users]"
        return users, example, code

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

    def _work(self, asked: Question) -> "_KeptRuns":
        """The run of `ablation_cost`."""
        return _KeptRuns.of_one_set(
            self.model,
            asked.users,
            asked.heads,
            ablation=asked.ablation,
            prompt_config=self.config,
            n_random=0,
            runs=self._runs,
        )

    def _effects(self, asked: Question, work: "_KeptRuns") -> list[dict[str, Any]]:
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
    def _next(self, asked: Question, work: "_KeptRuns | None") -> list[tuple[str, float, float]]:
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


@dataclass
class _KeptRuns(AblationWork):
    """`ablation_cost` that keeps its clean runs, so that other heads of the same question are measured at once."""

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
            while len(self.runs) > _KEPT_RUNS:
                self.runs.popitem(last=False)
        self.runs.move_to_end(key)
        return self.runs[key]


def streamed(model: HookedModel, prompt: Prompt, **options: Any) -> Generator[dict[str, Any], None, Generation]:
    """`{"text": …}` piece by piece, as `generate` writes it; returns the whole."""
    stream = generate(
        model, prompt, decode_config=DecodeConfig(keep_alternatives=_ALTERNATIVES), stream=True, **options
    )
    for _, text in stream:
        yield {"text": text}
    return stream.generation


def written_tokens(written: Generation) -> dict[str, Any]:
    """The tokens of the first text, what steering did to each, and what it moved there."""
    return {
        "pieces": written.pieces[0],
        "shifts": _numbers(written.shifts[0].tolist()),
        "kl": _numbers(written.kl[0].tolist()),
        "alternatives": written.alternatives[0] if written.alternatives else [],
        "scores": {},
    }


def _numbers(values: Sequence[float]) -> list[float | None]:
    """JSON knows no NaN."""
    return [None if math.isnan(value) else value for value in values]


def _text(request: Mapping[str, Any], name: str) -> str:
    value = request.get(name, "")
    if not isinstance(value, str):
        raise Refused(name, "is not a text")
    if len(value) > _MOST_LETTERS:
        raise Refused(name, f"has {len(value)} letters; at most {_MOST_LETTERS} are taken")
    return value


def _one_of(request: Mapping[str, Any], name: str, known: Sequence[str]) -> str:
    value = request.get(name, known[0])
    if value not in known:
        raise Refused(name, f"{value!r:.80} is unknown; use one of {', '.join(known)}")
    return str(value)


def _number(request: Mapping[str, Any], name: str) -> float:
    try:
        return check_number(SteeringError, name, request.get(name, 1.0), least=-1, most=_MOST_GAMMA)
    except SteeringError as error:
        raise Refused(name, str(error).removeprefix(f"{name} ")) from error
