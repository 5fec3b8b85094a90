"""What may change between two starts of a run: the second gives the numbers of a fresh run, or is refused."""

import copy
import json
import shutil
import warnings
from dataclasses import dataclass, field, fields, replace
from datetime import datetime
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from pcs import score_pcs
from safetensors.torch import load_file, save_file

import dps_lens as dps
from dps_lens.errors import RunError
from dps_lens.families import Repeated
from dps_lens.intervene import Ablation
from dps_lens.scoring.sweep import Sweep

HEADS = dps.HeadSet.parse("L1H2,L0H1")
CONFIG = dps.PromptConfig(items=3, profile_tokens=40, task_tokens=24, response_tokens=6)
QUIET = dps.RunConfig(progress=False)
DATED = "Today is {{ strftime_now('%d %B %Y') }}{{ place or '' }}.\n"


class Clock(datetime):
    """A day on which templates are rendered."""

    day = 1

    @classmethod
    def now(cls, tz=None):
        return cls(2026, 1, cls.day, tzinfo=tz)


@dataclass(frozen=True)
class Constant(Ablation):
    """z := what a table says."""

    name: ClassVar[str] = "constant"
    table: dict = field(default_factory=dict)

    def values_for(self, prompt, context):
        return self.table["z"]


@dataclass(frozen=True)
class Scaled(dps.Objective):
    """The NLL times a factor."""

    name: ClassVar[str] = "scaled"
    factor: float = 1.0

    def losses(self, logits, targets, clean):
        return -self.factor * logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)


class Start:
    """Everything that a start of a run is given."""

    def __init__(self, folder, users, monkeypatch):
        self.model = dps.load_model(str(folder))
        self.tokenizer, self.hf = self.model.tokenizer, self.model.original_model
        self.users, self.patch = list(users), monkeypatch
        self.options = {"prompt_config": CONFIG, "max_examples": 1, "run_config": QUIET}
        self.options |= {"ablation": Constant({"z": torch.zeros(3, 4, 8)}), "objective": Scaled()}
        self.tokenizer.chat_template = DATED + self.tokenizer.chat_template
        Clock.day = 1
        monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Clock)

    def score(self, out=None):
        return score_pcs(self.model, self.users, out=out, **self.options)

    def change_user(self, **values):
        self.users[0] = replace(self.users[0], **values)

    def change_document(self, number, **values):
        history = list(self.users[0].history)
        history[number] = replace(history[number], **values)
        self.change_user(history=tuple(history))

    def change_prompts(self, **values):
        self.options["prompt_config"] = replace(CONFIG, **values)


def head(start):
    """W_O of L1H2, by `.data`, of which no counter of torch tells."""
    start.hf.model.layers[1].self_attn.o_proj.weight.data[:, 16:24] = 0


def one_weight(start):
    with torch.no_grad():
        start.hf.model.layers[2].mlp.down_proj.weight[17, 29] += 1e-3


def buffer(start):
    start.hf.model.rotary_emb.inv_freq.mul_(1.01)


def number_format(start):
    for parameter in start.model.parameters():
        parameter.data = parameter.data.bfloat16()


def template(start):
    start.tokenizer.chat_template = start.tokenizer.chat_template.replace("Today", "The day")


def date_in_template(start):
    Clock.day = 2


def added_token(start):
    start.tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "the"]})


def tokenizer_file(start):
    from tokenizers import normalizers

    start.tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()


def truncation_left_behind(start):
    start.tokenizer("one", truncation=True, max_length=3)


def document_text(start):
    fields_ = dict(start.users[0].history[2].fields)
    start.change_document(2, fields=fields_ | {"text": fields_["text"] + " rain"})


def document_date(start):
    start.change_document(0, date="1990-01-01")


def order_of_dated_documents(start):
    start.change_user(history=start.users[0].history[::-1])


def order_of_documents(start):
    """Of those without a date, which is the order that they are read in."""
    start.change_user(history=tuple(replace(one, date=None) for one in start.users[0].history[::-1]))


def order_of_users(start):
    start.users.reverse()


def reference(start):
    first, *rest = start.users[0].examples
    start.change_user(examples=(replace(first, reference="another title"), *rest))


def label(start):
    start.change_user(labels={"style": "terse"})


def end_of_text(start):
    start.hf.generation_config.eos_token_id = [3, 7]


def rope_theta(start):
    start.hf.config.rope_parameters["rope_theta"] = 500.0


def library(start):
    def version(name):
        return "0.0.1" if name == "transformers" else real(name)

    from dps_lens.model import describe

    real = describe.version
    start.patch.setattr(describe, "version", version)


def products(start):
    torch.set_float32_matmul_precision("high")


def own_ablation(start):
    start.options["ablation"] = Constant({"z": torch.ones(3, 4, 8)})


def own_objective(start):
    start.options["objective"] = Scaled(2.0)


def option(**values):
    def change(start):
        start.options |= values

    change.__name__ = f"option_{'_'.join(values)}"
    return change


def prompt(**values):
    def change(start):
        start.change_prompts(**values)

    change.__name__ = f"prompt_{'_'.join(values)}"
    return change


PROMPTS = {
    "items": 2,
    "profile_tokens": 30,
    "task_tokens": 20,
    "response_tokens": 5,
    "retrieval": "recency",
    "seed": 1,
    "retrieval_tokens": "script",
    "chat_template_kwargs": {"place": " in Rome"},
    "profile_in": "turn",
}
REFUSED = {
    head: "model.weights was",
    one_weight: "model.weights was",
    buffer: "model.weights was",
    number_format: 'model.dtype was "float32", now "bfloat16"',
    template: "tokenizer was",
    date_in_template: "tokenizer was",
    added_token: "tokenizer was",
    tokenizer_file: "tokenizer was",
    document_text: "data was",
    document_date: "data was",
    order_of_documents: "data was",
    order_of_users: "data was",
    reference: "data was",
    label: "data was",
    end_of_text: "model.generation.eos_token_id was 3, now",
    rope_theta: r"model.config.rope_parameters.rope_theta was 10000.0, now 500.0",
    library: "model.libraries.transformers was",
    products: 'model.matmul was "highest", now "high"',
    own_ablation: "ablation.table.z was",
    own_objective: "objective.factor was 1.0, now 2.0",
    option(ablation="zero"): "ablation was",
    option(objective=None): "objective was",
    option(against=None): "against was",
    option(against="other_user"): "against was",
    option(positions="all"): "positions was",
    option(method="attribution"): "method was",
    option(method="screened"): "confirm was|method was",
    option(max_examples=2): "data was",
    option(seed=1): "seed was 0, now 1",
    option(score_config=dps.ScoreConfig(discovery="labelled")): "data was.*also discovery",
    **{prompt(**{name: value}): rf"prompt_config\.{name}[.\w]* was" for name, value in PROMPTS.items()},
}


@pytest.fixture(autouse=True)
def precision():
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.fixture(scope="module")
def folder(tiny_folders):
    return tiny_folders["llama"]


@pytest.fixture
def start(folder, probe, monkeypatch):
    return Start(folder, probe[:2], monkeypatch)


@pytest.fixture(scope="module")
def first(folder, probe, tmp_path_factory):
    """The run folder of the first start."""
    out = tmp_path_factory.mktemp("first")
    with pytest.MonkeyPatch.context() as patch:
        Start(folder, probe[:2], patch).score(out)
    return out


@pytest.fixture
def out(first, tmp_path):
    return shutil.copytree(first, tmp_path / "run")


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_field_of_a_prompt_is_tried():
    assert {*PROMPTS} == {one.name for one in fields(dps.PromptConfig)}


@pytest.mark.parametrize("change", REFUSED, ids=lambda change: change.__name__)
def test_another_start_is_refused_and_changes_nothing(start, out, change):
    before = contents(out)
    change(start)
    with pytest.raises(RunError, match=REFUSED[change]):
        start.score(out)
    assert contents(out) == before


@pytest.mark.parametrize(
    "change",
    [lambda start: None, truncation_left_behind, order_of_dated_documents],
    ids=["nothing", "truncation", "order"],
)
def test_the_same_start_goes_on(start, out, change):
    change(start)
    again, fresh = start.score(out), start.score()
    assert torch.equal(again.values, fresh.values)
    assert torch.equal(again.nll["own"], fresh.nll["own"])


def units(folder):
    return sorted((Path(folder) / "units").iterdir())


def swapped(out, other):
    one, two = units(out)
    content = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(content)


def of_another_model(out, other):
    shutil.copy(units(other)[0], units(out)[0])


def flipped_byte(out, other):
    content = bytearray(units(out)[0].read_bytes())
    content[-3] ^= 1
    units(out)[0].write_bytes(content)


def other_tensors(out, other):
    save_file({"x": torch.zeros(2)}, units(out)[0])


def without_a_note(out, other):
    save_file(load_file(units(out)[0]), units(out)[0])


def torn(out, other):
    units(out)[0].write_bytes(units(out)[0].read_bytes()[:100])


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (swapped, "is another unit"),
        (of_another_model, "is not of this run"),
        (flipped_byte, "is damaged"),
        (other_tensors, "is not of this run"),
        (without_a_note, "is not of this run"),
        (torn, "is not a whole safetensors file"),
    ],
)
def test_units_that_are_not_the_runs_own_are_made_again(start, folder, probe, out, tmp_path, monkeypatch, damage, said):
    fresh = start.score()
    if damage is of_another_model:
        other = Start(folder, probe[:2], monkeypatch)
        head(other)
        other.score(tmp_path / "other")
    damage(out, tmp_path / "other")
    with pytest.warns(UserWarning, match=said):
        again = start.score(out)
    assert torch.equal(again.values, fresh.values)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(start.score(out).values, fresh.values), "what was made again is kept"


def test_a_unit_of_other_code_is_an_error_that_names_its_file(start, out):
    folder = dps.runs.RunFolder(out, json.loads((out / "run.json").read_text()))
    key = f"{start.users[0].id}|{start.users[0].discovery_examples()[-1].id}"
    assert folder.get(key) is not None
    folder.put(key, {"else": torch.zeros(2)})
    with pytest.raises(RunError, match=r"units/.*safetensors holds no '(component|nll)\..*only else.*--force"):
        start.score(out)


def test_a_model_with_hooks_is_no_run(start, out, tmp_path):
    with dps.ablate(start.model, HEADS, positions="all"):
        for place in (out, tmp_path / "new"):
            with pytest.raises(RunError, match="the model has hooks"):
                start.score(place)
        assert start.score().values.shape == (2, 3, 4)
    assert not (tmp_path / "new").exists()


def test_a_result_of_no_run_is_not_overwritten(start, tmp_path):
    start.score().save(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(RunError, match="holds a HeadScores that no run was kept of"):
        start.score(tmp_path)
    assert contents(tmp_path) == before
    start.options["run_config"] = replace(QUIET, force=True)
    start.score(tmp_path)
    assert (tmp_path / "run.json").is_file()


def test_weights_are_read_where_they_are(start, folder, tmp_path):
    from dps_lens.model import describe_model

    layers = {f"model.layers.{number}": "disk" if number else "cpu" for number in range(3)}
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu", "model.rotary_emb": "cpu", **layers}
    spread = dps.load_model(str(folder), device_map=places, offload_folder=str(tmp_path / "disk"))
    assert any(one.device.type == "meta" for one in spread.parameters())
    assert describe_model(spread)["weights"] == describe_model(start.model)["weights"]
    empty = dps.load_model(str(folder), device="meta")
    object.__delattr__(empty, "_dps_lens_empty")
    with pytest.raises(dps.errors.ModelCheckError, match="has no values here"):
        describe_model(empty)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int64, torch.bool])
def test_digests_know_every_byte_of_every_dtype(dtype):
    from dps_lens.digests import tensor_digest

    values = (torch.arange(60).reshape(5, 12) % 2).to(dtype)
    changed = values.clone()
    changed.view(torch.uint8)[4, -1] ^= 1
    found = {tensor_digest(one) for one in (values, changed, values.reshape(12, 5), values[:, :0])}
    assert len(found) == 4
    assert tensor_digest(values.T.contiguous().T) == tensor_digest(values)


def test_equal_units_are_equal_files(tmp_path):
    folder = dps.runs.RunFolder(tmp_path, {})
    found = set()
    for _ in range(20):
        folder.put("a", {"x": torch.ones(3), "y": torch.zeros(2)})
        found.add(units(tmp_path)[0].read_bytes())
    assert len(found) == 1


def grid(start, out):
    return dps.steering_grid(
        start.model, start.users, HEADS, gammas=(1.0,), ks=(2,), max_new_tokens=3, out=out, **start.more
    )


def table(start, out):
    methods = {"rag": "rag", "vector": "stylevector"}
    config = dps.EvaluateConfig(layers=(1,), choose_on=0, vector_examples=1)
    strengths = start.more.pop("strengths", (0.5,))
    found = dps.evaluate(
        start.model, start.users, methods, strengths=strengths, max_new_tokens=3, max_examples=1,
        evaluate_config=config, out=out, **start.more,
    )  # fmt: skip
    return found.rows


CALLS = {
    "ablation_curve": (
        lambda start, out: dps.ablation_curve(
            start.model, start.users, {"heads": HEADS}, ks=(1,), max_examples=1, out=out,
            **{"n_random": 1} | start.more,
        ),
        {"n_random": 2},
    ),
    "patch_heads": (
        lambda start, out: dps.patch_heads(
            start.model, start.users, {"heads": HEADS}, ks=(1,), n_random=1, max_examples=1, out=out, **start.more
        ),
        {"against": "other_user"},
    ),
    "vector_recovery": (
        lambda start, out: dps.vector_recovery(
            start.model, start.users, {"heads": HEADS}, ks=(1,), n_random=1, max_examples=1, out=out, **start.more
        ),
        {"vector_config": dps.VectorConfig(scale=2.0)},
    ),
    "steering_sweep": (
        lambda start, out: dps.steering_sweep(
            start.model, start.users, {"dps": ("dps", HEADS)}, **{"strengths": (1.0,)} | start.more, k=2, n_random=1,
            max_examples=1, out=out,
        ),
        {"strengths": (1.0000001,)},
    ),
    "ablated_generation": (
        lambda start, out: dps.ablated_generation(
            start.model, start.users, {"heads": HEADS}, k=2, n_random=1, max_examples=1, out=out,
            **{"max_new_tokens": 3} | start.more,
        ),
        {"max_new_tokens": 4},
    ),
    "steering_grid": (grid, {"rule": "amplify"}),
    "evaluate": (table, {"strengths": (0.50000001,)}),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_other_calls_know_their_own(folder, probe, monkeypatch, tmp_path, name):
    call, setting = CALLS[name]

    def begin(*changes, **more):
        start = Start(folder, probe[:2], monkeypatch)
        start.more = {"prompt_config": CONFIG, "run_config": QUIET, **more}
        for change in changes:
            change(start)
        return start

    call(begin(), tmp_path)
    before = contents(tmp_path)
    for changes, more in (((head,), {}), ((document_text,), {}), ((date_in_template,), {}), ((), setting)):
        with pytest.raises(RunError, match="was made with other settings"):
            call(begin(*changes, **more), tmp_path)
        assert contents(tmp_path) == before
    swapped_units = units(tmp_path)[:2]
    contents_ = [unit.read_bytes() for unit in swapped_units]
    for unit, content in zip(swapped_units, reversed(contents_), strict=True):
        unit.write_bytes(content)
    with pytest.warns(UserWarning, match="is another unit"):
        call(begin(), tmp_path)


def test_families_are_kept_apart_by_every_byte(start, tmp_path):
    kinds = [Repeated("induction", n_prompts=2, length=6)]
    one = dps.reference_heads(start.model, kinds, cache=tmp_path, run_config=QUIET)["induction"]
    head_of_queries = start.hf.model.layers[1].self_attn.q_proj.weight
    head_of_queries.data[16:24, 5] += 0.5
    two = dps.reference_heads(start.model, kinds, cache=tmp_path, run_config=QUIET)["induction"]
    fresh = dps.reference_heads(start.model, kinds, cache=False, run_config=QUIET)["induction"]
    assert torch.equal(two.values, fresh.values)
    assert not torch.equal(two.values, one.values)


def test_a_page_knows_its_own(start, out, tmp_path):
    scores = start.score()
    options = {"gammas": (1.0,), "ks": (2,), "k": 2, "max_new_tokens": 3, "run_config": QUIET}
    dps.explore(start.model, start.users, scores, out=tmp_path / "page", **options)
    head(start)
    with pytest.raises(RunError, match="model.weights was"):
        dps.explore(start.model, start.users, scores, out=tmp_path / "page", **options)


def test_the_description_says_what_the_model_computes_with(start):
    from dps_lens.model import describe_model

    found = describe_model(start.model)
    assert found["config"]["rope_parameters"] == {"rope_theta": 10000.0, "rope_type": "default"}
    assert found["generation"]["eos_token_id"] == 3
    assert "_name_or_path" not in found["config"]
    assert json.loads(json.dumps(found)) == found
    assert copy.deepcopy(found) == describe_model(start.model)


def test_what_changes_while_units_are_made_is_noticed(start, tmp_path, monkeypatch):
    real = Sweep.make

    def make(self, key, given=None):
        Clock.day += 1  # midnight passes
        return real(self, key, given)

    monkeypatch.setattr(Sweep, "make", make)
    with pytest.raises(RunError, match="tokenizer was .* when the run began and is .* now"):
        start.score(tmp_path / "late")
    assert not (tmp_path / "late" / "scores.json").exists()
