"""Standard tasks by lm_eval: unsteered, the scores of its own model; steered, those of our rules."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import dps_lens as dps
from dps_lens.errors import EvaluationError
from dps_lens.evaluation.forced import Forced
from dps_lens.evaluation.harness import DpsLens, _prompt
from dps_lens.heads import HeadSet
from dps_lens.intervene import Zero
from dps_lens.model import runner_of

HEADS = "L0H1 L2H3"
ITEMS = [
    {"question": "Where does rain fall?", "options": ["in the town", "on a roof of wax", "nowhere"], "answer": 0},
    {"question": "What do bees make?", "options": ["honey", "a headline", "umbrellas for all"], "answer": 0},
    {"question": "Who writes the posts?", "options": ["nobody", "the user", "a comb"], "answer": 1},
    {"question": "How many of them are there?", "options": ["seven", "two of them", "a few"], "answer": 2},
]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A task of each kind of request, in the harness's own form."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "items.jsonl").write_text("\n".join(map(json.dumps, ITEMS)))
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "items.jsonl")}},
        "test_split": "test",
    }
    kinds = {
        "choosing": {
            "output_type": "multiple_choice",
            "doc_to_text": "Question: {{question}}\nAnswer:",
            "doc_to_choice": "{{options}}",
            "doc_to_target": "answer",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        "reading": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{question}} {{options[0]}}",
            "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
        },
        "writing": {
            "output_type": "generate_until",
            "doc_to_text": "Question: {{question}}\nAnswer:",
            "doc_to_target": "{{options[answer]}}",
            "generation_kwargs": {"until": ["\n", " the"], "max_gen_toks": 8, "do_sample": False},
            "metric_list": [{"metric": "exact_match"}],
        },
    }  # fmt: skip
    for name, kind in kinds.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **shared, **kind}))
    return TaskManager(include_path=str(folder), include_defaults=False), list(kinds)


def evaluated(model, tasks):
    manager, names = tasks
    return simple_evaluate(
        model=model, tasks=names, task_manager=manager, log_samples=True, bootstrap_iters=0, cache_requests=False
    )


def answers(found):
    """What the model said to each item, by task."""

    def parts(sample):
        replies = (reply if isinstance(reply, list | tuple) else [reply] for reply in sample["filtered_resps"])
        return [part for reply in replies for part in reply]

    return {
        task: [parts(one) for one in sorted(samples, key=lambda one: one["doc_id"])]
        for task, samples in found["samples"].items()
    }


@pytest.fixture(scope="module")
def own(tinies, tasks):
    """The harness's own model on the same weights."""
    tiny = tinies("llama")
    return evaluated(HFLM(pretrained=tiny.plain, tokenizer=tiny.hooked.tokenizer, batch_size=1, device="cpu"), tasks)


@pytest.mark.parametrize("given", [{"rule": "greedy"}, {"rule": "dps", "heads": HEADS, "gamma": 0}])
def test_unsteered_scores_are_those_of_the_harness(tinies, tasks, own, given):
    found = evaluated(DpsLens(tinies("llama").hooked, **given), tasks)
    assert found["results"].keys() == own["results"].keys()
    for task, scores in own["results"].items():
        for name, value in scores.items():
            if isinstance(value, float):
                assert found["results"][task][name] == pytest.approx(value, rel=1e-4), (task, name)
    for task, replies in answers(own).items():
        for ours, theirs in zip(answers(found)[task], replies, strict=True):
            for one, other in zip(ours, theirs, strict=True):
                assert one == (pytest.approx(other, abs=1e-3) if isinstance(other, float) else other), task


def test_steered_likelihoods_are_those_of_the_two_branches(tinies):
    model = tinies("llama").hooked
    lens = DpsLens(model, heads=HEADS, gamma=0.7)
    context, answer = lens._encode_pair("Question: where does rain fall?\nAnswer:", " in the old town")
    total, greedy = lens._likelihood(context, answer)
    forced = Forced(runner_of(model), _prompt(torch.tensor([*context, *answer]), len(context)))
    heads = dict.fromkeys(HeadSet.parse("L0H1,L2H3"), 1.0)
    steered = 1.7 * forced.logits() - 0.7 * forced.ablated(Zero(), heads)
    expected = steered.log_softmax(-1).gather(-1, torch.tensor(answer)[:, None]).sum()
    assert total == pytest.approx(float(expected), abs=1e-4)
    assert greedy == bool((steered.argmax(-1) == torch.tensor(answer)).all())
    plain, _ = DpsLens(model, rule="greedy")._likelihood(context, answer)
    assert abs(total - plain) > 1e-3


def test_texts_are_written_by_the_rule_up_to_an_end(tinies, tasks):
    model = tinies("llama").hooked
    found = answers(evaluated(DpsLens(model, heads=HEADS, gamma=1.5), tasks))["writing"]
    for (text,), item in zip(found, ITEMS, strict=True):
        ids = torch.tensor(model.tokenizer.encode(f"Question: {item['question']}\nAnswer:"))
        whole = dps.generate(
            model, _prompt(ids, len(ids)), heads=HeadSet.parse("L0H1,L2H3"), gamma=1.5, max_new_tokens=8
        ).texts[0]
        assert text == min(whole.split("\n")[0], whole.split(" the")[0], key=len)


def test_heads_come_from_runs_and_names(tinies, probe, short, tmp_path):
    model = tinies("llama").hooked
    scores = dps.score_heads(model, probe[:2], max_examples=1, prompt_config=short, out=tmp_path / "run")
    assert DpsLens(model, heads=str(tmp_path / "run"), k=3).heads == scores.top(3)
    assert DpsLens(model, heads="L0H1+L2H3").heads == HeadSet.parse("L0H1,L2H3")
    cfg = model.cfg
    vector = dps.SteeringVector(torch.randn(cfg.d_model), 1)
    vector.save(tmp_path / "vector")
    assert torch.equal(DpsLens(model, rule="vector", vector=str(tmp_path / "vector")).vector.values, vector.values)


def test_what_tasks_cannot_have_is_refused(tinies):
    model = tinies("llama").hooked
    with pytest.raises(EvaluationError, match="'cad' contrasts with a prompt without its profile"):
        DpsLens(model, rule="cad")
    with pytest.raises(EvaluationError, match="rule 'dps' needs heads"):
        DpsLens(model)
    with pytest.raises(EvaluationError, match="rule 'greedy' takes no heads"):
        DpsLens(model, rule="greedy", heads=HEADS)
    with pytest.raises(EvaluationError, match="no model argument 'gama'"):
        DpsLens(model, heads=HEADS, gama=2)


@pytest.mark.full
def test_the_command_line_of_the_harness(tiny_folders, tmp_path):
    """As in the docs, with the device that lm_eval asks for by itself."""
    command = [sys.executable, "-m", "dps_lens.evaluation.harness", "run", "--model", "dps_lens", "--limit", "2"]
    command += ["--include_path", "examples/standard", "--tasks", "everyday_facts", "--output_path", str(tmp_path)]
    command += ["--model_args", f"model={tiny_folders['llama']},heads={HEADS.replace(' ', '+')},gamma=1"]
    ended = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert "everyday_facts" in ended.stdout
    assert list(tmp_path.rglob("results*.json"))
