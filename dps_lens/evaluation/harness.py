"""Steered models in the EleutherAI evaluation harness, `lm_eval`: what steering does to standard tasks.

    python -m dps_lens.evaluation.harness run --model dps_lens --tasks arc_easy \\
        --model_args '{"model": "smollm2-135m", "heads": "runs/demo", "rule": "dps", "gamma": 1}'

is `lm_eval` with one model more; `DpsLens(…)` goes to `lm_eval.simple_evaluate(model=…)`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from warnings import warn

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from dps_lens.data import Prompt
from dps_lens.errors import EvaluationError
from dps_lens.evaluation.forced import Steered
from dps_lens.found import FoundHeads, load_heads
from dps_lens.heads import HeadSet
from dps_lens.model import HookedModel, load_model
from dps_lens.model.losses import token_losses
from dps_lens.progress import progress_bar
from dps_lens.steering import Sampling, generate
from dps_lens.steering.rules import find_rule
from dps_lens.steering.vector import HeadVector, SteeringVector, Vector

_DEVICE = "cuda:0"
"""What `lm_eval` asks for where nobody asks for a device."""


@register_model("dps_lens")
class DpsLens(TemplateLM):
    """A model under a rule of `generate`, for `lm_eval`.

    Likelihoods are of the steered distribution, teacher-forced, without the `min_p` of `dola`; texts are written by it.
    Contexts and answers become
    tokens as in `lm_eval`'s own `hf` model, so that `rule="greedy"`, or γ = 0, gives its scores.

    Args:
        model: a name, a folder, or a hooked model.
        heads: of the rule: a run folder, a `HeadSet`, or names, `"L3H1 L7H2"` (also apart by commas or plus signs).
        rule: as in `generate`; not one that contrasts with a prompt without its profile, for tasks have none.
        gamma: its strength.
        vector: of the rule, or a folder that one was saved to.
        k: how many heads to take of a run of scores.
        max_gen_toks: tokens of a written answer, where the task does not say.
        device: of the model.
        dtype: of its weights.
        batch_size: is taken and changes nothing: requests are run one after the other.
        options: `max_batch_size` and what else `lm_eval` hands to every model.

    Raises:
        EvaluationError: the rule needs a negative prompt, lacks its heads or its vector, or takes none; or an option is
            unknown.
    """

    def __init__(
        self,
        model: HookedModel | str = "smollm2-135m",
        heads: HeadSet | str = "",
        rule: str = "dps",
        gamma: float | int = 1.0,
        vector: Vector | str | None = None,
        k: int = 10,
        max_gen_toks: int = 256,
        device: str | None = None,
        dtype: str = "auto",
        batch_size: int | str | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if unknown := sorted({*options} - {"max_batch_size"}):
            raise EvaluationError(f"lm_eval: dps_lens takes no model argument {unknown[0]!r}; see DpsLens")
        self.rule, self.gamma, self.max_gen_toks = find_rule(rule), float(gamma), max_gen_toks
        if self.rule.needs_negative:
            raise EvaluationError(
                f"lm_eval: rule {rule!r} contrasts with a prompt without its profile, and tasks have none; use a rule "
                "of heads or vectors, or dola"
            )
        self.heads = heads if isinstance(heads, HeadSet) else _heads(heads, k)
        self.vector = _vector(vector) if isinstance(vector, str) else vector
        for needed, given, what in (
            (self.rule.needs_heads, len(self.heads) > 0, "heads"),
            (self.rule.needs_vectors, self.vector is not None, "vector"),
        ):
            if needed is not given:
                raise EvaluationError(f"lm_eval: rule {rule!r} {'needs' if needed else 'takes no'} {what}")
        if device == _DEVICE and not torch.cuda.is_available():
            warn(f"lm_eval: there is no {device} here, its default; the model is on the CPU", stacklevel=2)
            device = None
        self.hooked = load_model(model, device=device, dtype=dtype) if isinstance(model, str) else model
        self.tokenizer = self.hooked.tokenizer

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context."""
        start = self.tokenizer.bos_token_id
        return self.eot_token_id if start is None else int(start)

    @property
    def tokenizer_name(self) -> str:
        """For the harness's cache."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text."""
        text = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return str(text)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """As the harness's own model: with the tokenizer's special tokens, unless the text begins with one."""
        start = self.tokenizer.decode(self.prefix_token_id)
        if add_special_tokens is None and start and string.startswith(start):
            add_special_tokens = False
        given = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return [int(token) for token in self.tokenizer.encode(string, **given)]

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        found = []
        with progress_bar(total=len(requests), desc="likelihoods", unit="answer", shown=not disable_tqdm) as bar:
            for _, context, answer in requests:
                found.append(self._likelihood(context, answer))
                bar.update()
        return found

    @torch.inference_mode()
    def _likelihood(self, context: Sequence[int], answer: Sequence[int]) -> tuple[float, bool]:
        # As many tokens as the model sees, and one more, which is only predicted.
        tokens = torch.tensor([*context, *answer][-(self.hooked.cfg.n_ctx + 1) :])
        start = len(tokens) - len(answer)
        if start < 1:
            raise EvaluationError(f"lm_eval: an answer of {len(answer)} tokens leaves no context for this model")
        steered = Steered(self.hooked, _prompt(tokens, start))
        given = self.rule.given(self.gamma, self.gamma, float("inf"))
        logits = steered.logits(self.rule, given, dict.fromkeys(self.heads, 1.0), self.vector)
        total = float(token_losses(logits, steered.targets).double().sum())
        return -total, bool((logits.argmax(-1) == steered.targets).all())

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows that do not overlap."""
        found = []
        with progress_bar(total=len(requests), desc="texts", unit="text", shown=not disable_tqdm) as bar:
            for request in requests:
                (text,) = request.args
                windows = get_rolling_token_windows(
                    token_list=self.tok_encode(text),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.hooked.cfg.n_ctx,
                    context_len=1,
                )
                found.append(sum(self._likelihood(*window)[0] for window in map(make_disjoint_window, windows)))
                bar.update()
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts, up to the first of the task's ends."""
        found = []
        with progress_bar(total=len(requests), desc="texts", unit="text", shown=not disable_tqdm) as bar:
            for request in requests:
                context, given = request.args
                found.append(self._written(context, dict(given)))
                bar.update()
        return found

    def _written(self, context: str, given: dict[str, Any]) -> str:
        ends = given.get("until") or []
        ends = [ends] if isinstance(ends, str) else list(ends)
        length = int(given.get("max_gen_toks", self.max_gen_toks))
        room = self.hooked.cfg.n_ctx - length
        if room < 2:
            raise EvaluationError(f"lm_eval: {length} new tokens leave no room for a context; lower max_gen_toks")
        tokens = torch.tensor(self.tok_encode(context)[-room:])
        sampling = None
        if given.get("do_sample") and float(given.get("temperature") or 0) > 0:
            sampling = Sampling(float(given["temperature"]), given.get("top_k"), given.get("top_p"))
        options: dict[str, Any] = {"rule": self.rule, "max_new_tokens": length, "sampling": sampling}
        options |= {"gamma": self.gamma} if self.rule.takes_gamma else {}
        options |= {"heads": self.heads} if self.rule.needs_heads else {}
        options |= {"vectors": self.vector} if self.rule.needs_vectors else {}
        options |= {"alpha": self.gamma} if self.rule.takes_alpha else {}
        prompt = _prompt(tokens, len(tokens))
        text = ""
        # A stream that is left needs no clean-up: what is written behind an end costs nothing.
        for _, piece in generate(self.hooked, prompt, stream=True, **options):
            text += piece
            if any(end and end in text for end in ends):
                break
        return min((text.split(end)[0] for end in ends if end), key=len, default=text)


def _prompt(tokens: torch.Tensor, start: int) -> Prompt:
    spans = {"profile": (0, 0), "task": (0, start), "response": (start, len(tokens))}
    return Prompt(tokens, spans, "", "none", "lm_eval", "lm_eval", ())


def _heads(asked: str, k: int) -> HeadSet:
    """Of a run folder, or by name."""
    if asked and Path(asked).is_dir():
        run = load_heads(asked)
        return run.heads if isinstance(run, FoundHeads) else run.top(k)
    return HeadSet.parse(",".join(asked.replace(",", " ").replace("+", " ").split()))


def _vector(folder: str) -> Vector:
    kind = HeadVector if (Path(folder) / f"{HeadVector.stem}.json").is_file() else SteeringVector
    return kind.load(folder)


def main() -> None:
    """`lm_eval`, with this model among its own."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
