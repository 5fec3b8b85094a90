"""What works on which architecture, held against plain transformers; makes the table of docs/architectures.md."""

import warnings
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES, Plain, save_random
from torch import Tensor
from torch.nn.functional import cross_entropy

import dps_lens as dps
from dps_lens.data import Prompt
from dps_lens.errors import DPSLensError
from dps_lens.intervene import find_ablation
from dps_lens.model import runner_of
from dps_lens.scoring.clean_run import CleanRun, single_heads

TABLE = Path(__file__).parents[2] / "docs" / "architectures.md"
HEAD = (1, 2)
START, STOP = 28, 40
TOLERANCE = 2e-4
GAMMA = 1.5
NEW = 5


def a_prompt(seed: int, start: int = START) -> Prompt:
    tokens = torch.randint(5, 600, (start + STOP - START,), generator=torch.Generator().manual_seed(seed))
    spans = {"profile": (2, 12), "task": (12, start), "response": (start, len(tokens))}
    return Prompt(tokens, spans, "", "own", f"e{seed}", "u", ())


class Subject:
    """One architecture: the hooked model, and the plain one that says what is right."""

    def __init__(self, name: str, folder: Path) -> None:
        save_random(name, folder)
        self.name, self.folder = name, folder
        self.model = dps.load_model(str(folder))
        dps.check_model(self.model)
        self.prompt, self.other = a_prompt(0), a_prompt(1)

    @cached_property
    def plain(self) -> Plain:
        return Plain(self.folder)

    def columns(self, head: int) -> slice:
        width = self.model.cfg.d_head
        return slice(head * width, (head + 1) * width)

    def nll(self, logits: Tensor) -> float:
        tokens = self.prompt.tokens
        return float(cross_entropy(logits[START - 1 : STOP - 1].double(), tokens[START:]))

    def ablated(self, ablation: object, masks: Tensor | None = None, positions: str = "response") -> Tensor:
        clean = CleanRun(
            runner_of(self.model), self.prompt, ablation=find_ablation(ablation), positions=positions, batch_size=5
        )
        return clean.ablated(self.mask if masks is None else masks)

    @property
    def mask(self) -> Tensor:
        return dps.HeadSet([HEAD]).mask(self.model.cfg)[None]

    def pcs(self) -> float:
        """NLL with each head ablated, rows joining from layer to layer, from the response on and everywhere."""
        worst, n_heads = 0.0, self.model.cfg.n_heads
        for positions, begin in (("response", START - 1), ("all", 0)):
            found = self.ablated("zero", single_heads(self.model.cfg.n_layers, n_heads), positions)
            for row, value in enumerate(found.tolist()):
                layer, head = divmod(row, n_heads)
                with self.plain.edited(layer, self.columns(head), torch.zeros_like, begin):
                    worst = max(worst, abs(value - self.nll(self.plain.logits(self.prompt.tokens))))
        return worst

    def z(self, prompt: Prompt) -> Tensor:
        """What the projection of the head's layer reads of it, from the last prompt token on."""
        kept: list[Tensor] = []
        with self.plain.edited(HEAD[0], self.columns(HEAD[1]), lambda z: kept.append(z.clone()) or z, START - 1):
            self.plain.logits(prompt.tokens)
        return kept[0]

    def patch(self) -> float:
        found = self.ablated(dps.Patch(z=dps.record_z(self.model, self.other)[:, :-1]))
        theirs = self.z(self.other)
        with self.plain.edited(HEAD[0], self.columns(HEAD[1]), lambda z: theirs, START - 1):
            return abs(float(found) - self.nll(self.plain.logits(self.prompt.tokens)))

    def mean(self) -> float:
        found = self.ablated(dps.Mean(z=dps.record_z(self.model, self.other).mean(1)))
        theirs = self.z(self.other).mean(0)
        with self.plain.edited(HEAD[0], self.columns(HEAD[1]), lambda z: theirs[None].expand(z.shape), START - 1):
            return abs(float(found) - self.nll(self.plain.logits(self.prompt.tokens)))

    def uniform(self) -> float:
        found = float(self.ablated("uniform"))
        plain = Plain(self.folder, attn_implementation="eager")
        with plain.evenly(*HEAD, self.model.cfg.n_heads, START - 1):
            return abs(found - self.nll(plain.logits(self.prompt.tokens)))

    def attention(self) -> float:
        found = dps.attention_pattern(self.model, self.prompt, dps.HeadSet([HEAD])).pattern[0]
        plain = Plain(self.folder, attn_implementation="eager")
        with torch.no_grad():
            attentions = plain.model(input_ids=self.prompt.tokens[None], output_attentions=True).attentions
        return float((found - attentions[HEAD[0]][0, HEAD[1], START - 1 : STOP - 1]).abs().max())

    def contrast(self, tokens: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Steered logits of every generated token, and what they are more than the full ones, by two whole passes."""
        read = tokens[:-1]  # the last token is written, never read
        full = self.plain.logits(read)
        with self.plain.edited(HEAD[0], self.columns(HEAD[1]), torch.zeros_like, start - 1):
            masked = self.plain.logits(read)
        change = GAMMA * (full - masked)
        return (full + change)[start - 1 :], change[start - 1 :]

    def steered(self, prompts: list[Prompt]) -> list[float]:
        """Deviation of every row of one call."""
        config = dps.DecodeConfig(keep_delta_logits=True, stop_at_eos=False)
        given = [Prompt(one.prompt_tokens, {**one.spans, "response": (len(one.prompt_tokens),) * 2}, "", "own",
                        one.example_id, "u", ()) for one in prompts]  # fmt: skip
        out = dps.generate(
            self.model, given, heads=dps.HeadSet([HEAD]), gamma=GAMMA, max_new_tokens=NEW, decode_config=config
        )
        worst = []
        for one, tokens, delta in zip(given, out.tokens, out.delta_logits, strict=True):
            whole, start = torch.cat([one.tokens, tokens]), len(one.tokens)
            steered, change = self.contrast(whole, start)
            gap = steered.max(-1).values - steered.gather(-1, tokens[:, None])[:, 0]
            worst.append(max(float((delta - change).abs().max()), float(gap.max())))
        return worst

    def dps(self) -> float:
        return self.steered([self.prompt])[0]

    def batch(self) -> float:
        return max(self.steered([self.prompt, a_prompt(2, 13), a_prompt(3, 60)]))

    def processor(self) -> float:
        ids = self.prompt.prompt_tokens
        processor = dps.logits_processor(self.model, dps.HeadSet([HEAD]), GAMMA)
        out = self.model.original_model.generate(
            ids[None],
            attention_mask=torch.ones_like(ids[None]),
            logits_processor=[processor],
            do_sample=False,
            max_new_tokens=NEW,
            min_new_tokens=None,
            eos_token_id=None,
            pad_token_id=3,
        )[0]
        steered, _ = self.contrast(out, START)
        return float((steered.max(-1).values - steered.gather(-1, out[START:, None])[:, 0]).max())

    def lora(self) -> float:
        from peft import PeftModel

        target = dps.export_lora(self.model, dps.HeadSet([HEAD]), self.folder / "adapter")
        with self.plain.edited(HEAD[0], self.columns(HEAD[1]), torch.zeros_like):
            right = self.plain.logits(self.prompt.tokens)
        tuned = PeftModel.from_pretrained(Plain(self.folder).model, target)
        with torch.no_grad():
            found = tuned(input_ids=self.prompt.tokens[None], use_cache=False).logits[0]
        return float((found - right).abs().max())


COLUMNS: dict[str, Callable[[Subject], float]] = {
    "PCS": Subject.pcs,
    "patch": Subject.patch,
    "mean": Subject.mean,
    "uniform": Subject.uniform,
    "attention": Subject.attention,
    "DPS": Subject.dps,
    "unequal lengths": Subject.batch,
    "processor": Subject.processor,
    "LoRA": Subject.lora,
}


EXPECTED = {
    "Bloom": "exact " * 9,
    "GPTJ": "exact exact exact refused exact exact exact exact exact",
    "GptOss": "exact exact exact refused exact exact exact exact exact",
    "Falcon, ALiBi": "exact exact exact refused refused exact exact refused exact",
    "OpenAIGPT": "refused " * 9,
    "XGLM": "exact exact exact refused exact exact exact exact exact",
}


def outcome(measure: Callable[[Subject], float], subject: Subject) -> str:
    try:
        error = measure(subject)
    except DPSLensError:
        return "refused"
    assert error <= TOLERANCE, f"{subject.name}, {measure.__name__}: off by {error:.3g}"
    return "exact"


def row(name: str, folder: Path) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            subject = Subject(name, folder)
        except DPSLensError:
            return ["refused"] * len(COLUMNS)
        return [outcome(measure, subject) for measure in COLUMNS.values()]


def page(rows: dict[str, list[str]]) -> str:
    marks = {"exact": "✓", "refused": "refused"}
    lines = [
        "# Architectures",
        "",
        "Small random models of the architectures below, made from the config classes of transformers, are held",
        "against plain transformers, which knows nothing of hooks: ✓ where log-probabilities (nats) or logits agree to",
        f"{TOLERANCE:g}, *refused* where an error says what is missing. Nothing else occurs. `make test-full` makes",
        "this page anew and fails where it differs.",
        "",
        "| column | what is compared |",
        "|---|---|",
        "| PCS | the NLL of a response with each head zeroed, from the response on and everywhere |",
        "| patch, mean | the same with another run's z, or its mean, in the place of one head's |",
        '| uniform | `ablation="uniform"`, `rule="decore"`: a head that attends evenly to what it sees |',
        "| attention | attention patterns, which induction and retrieval heads are found by |",
        "| DPS | full and masked logits at every step of `dps.generate`, and the tokens chosen |",
        "| unequal lengths | the same for three prompts of 13 to 60 tokens in one batch |",
        "| processor | tokens of `generate` of transformers with `dps.logits_processor` |",
        "| LoRA | logits of the plain model with the adapter of `dps.export_lora`, read by peft |",
        "",
        f"| architecture | {' | '.join(COLUMNS)} |",
        "|---|" + ":-:|" * len(COLUMNS),
        *(f"| {name} | {' | '.join(marks[one] for one in outcomes)} |" for name, outcomes in rows.items()),
    ]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("name", EXPECTED)
def test_an_architecture_is_exact_or_refused(name, tmp_path):
    assert row(name, tmp_path) == EXPECTED[name].split()


@pytest.mark.full
def test_no_architecture_is_wrong(tmp_path, unchecked):
    made = page({name: row(name, tmp_path / str(index)) for index, name in enumerate(ARCHITECTURES)})
    found = tmp_path / TABLE.name
    found.write_text(made, encoding="utf-8")
    assert made == TABLE.read_text(encoding="utf-8"), f"copy {found} to {TABLE} if what has changed in it is right"
