"""Pairs, choices and stated preferences: records of our own, and the layouts of published sets, with texts of ours."""

import csv
import dataclasses
import json

import pytest

import dps_lens as dps
from dps_lens.data import load_users
from dps_lens.data.conditions import donors_of
from dps_lens.errors import DataError, PromptError

PAIRS = [
    {
        "user_id": "ann",
        "prompt": f"Plan day {n} of the trip.",
        "chosen": f"Walk {n} miles.",
        "rejected": f"Rest {n} hours.",
    }
    for n in range(5)
]

CHOICE = {
    "user_id": "ann", "question": "A drink?", "options": ["Milk", "Tea"], "answer": "b", "history": ["I like tea."],
}  # fmt: skip

DRINK = {
    "user_id": "ann",
    "question": "A drink?",
    "options": ["Milk", "Tea"],
    "answer": "b",
    "history": ["I like tea."],
}


def write(folder, name, value):
    path = folder / name
    if name.endswith(".csv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            rows = csv.DictWriter(file, list(value[0]))
            rows.writeheader()
            rows.writerows(value)
    elif name.endswith(".jsonl"):
        path.write_text("\n".join(map(json.dumps, value)), encoding="utf-8")
    else:
        path.write_text(json.dumps(value), encoding="utf-8")
    return path


def test_pairs_of_a_user_are_history_and_evaluation():
    (user,) = load_users(PAIRS)
    assert [example.reference for example in user.examples] == ["Walk 3 miles.", "Walk 4 miles."]
    assert user.examples[0].rejected == ("Rest 3 hours.",)
    assert user.examples[0].input == "Plan day 3 of the trip."
    assert len(user.history) == 3
    found = dps.load_users(
        [*PAIRS, *({**one, "prompt": one["prompt"] + " Again.", "id": f"b{n}"} for n, one in enumerate(PAIRS))]
    )
    discovery = found[0].discovery_examples()
    assert discovery
    assert all(one.rejected[0].startswith("Rest") for one in discovery)


def test_messages_and_several_rejected_answers_are_read():
    said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Walk home."}]
    rows = [{**one, "chosen": said, "rejected": ["Rest.", "Swim."], "id": f"x{n}"} for n, one in enumerate(PAIRS)]
    (user,) = load_users(rows)
    assert user.examples[0].reference == "Walk home."
    assert user.examples[0].rejected == ("Rest.", "Swim.")


@pytest.mark.parametrize("answer", ["b", "(b)", "B.", 1, "Tea"])
def test_the_right_option_is_named_by_letter_place_or_text(answer):
    row = {
        "user_id": "ann",
        "question": "A drink?",
        "options": ["Milk", "Tea", "Juice"],
        "answer": answer,
        "history": ["I like tea."],
    }
    (user,) = load_users([row])
    assert user.examples[0].reference == "Tea"
    assert user.examples[0].rejected == ("Milk", "Juice")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chosen": None}, "field 'options' is missing|field 'chosen' is missing|holds no"),
        ({"rejected": "walk  4 miles!"}, "two answers are the same"),
        ({"rejected": ["Rest.", "rest"]}, "two answers are the same"),
        (
            {"prompt": [{"role": "user", "content": "I am vegan"}, {"role": "user", "content": "Dinner?"}]},
            "into 'history'",
        ),
        ({"chosen": [{"role": "user", "content": "Rest."}]}, "not 'assistant'"),
        ({"rejected": ""}, "field 'rejected' is empty"),
        ({"rejected": []}, "rejected"),
        ({"prompt": None}, "field 'prompt' is missing"),
        ({"user_id": None}, "field 'user_id' is missing"),
        ({"id": "0"}, "stands twice"),
    ],
)
def test_records_that_tell_nothing_are_refused(change, message):
    rows = [*PAIRS[:-1], {**PAIRS[-1], **change}]
    with pytest.raises(DataError, match=message) as error:
        load_users(rows)
    assert "record 4" in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"options": ["Milk"]}, "a choice needs two"),
        ({"answer": "Water"}, "none of the 3 options"),
        ({"answer": 7}, "none of the 3 options"),
        ({"answer": True}, "none of the 3 options"),
        ({"history": []}, "is empty"),
    ],
)
def test_choices_without_a_choice_are_refused(change, message):
    row = {
        "user_id": "ann",
        "question": "A drink?",
        "options": ["Milk", "Tea", "Juice"],
        "answer": "b",
        "history": ["I like tea."],
    }
    with pytest.raises(DataError, match=message):
        load_users([{**row, **change}])


def test_personalized_rewardbench(tmp_path, llama):
    rows = [
        {
            "id": f"q{n}",
            "question": f"Which opening suits me, try {n}?",
            "profile": [{"category": "Games", "id": f"p{m}", "text": f"How do I learn endgame {m}?"} for m in range(3)],
            "rubric_aspects": [{"aspect": "theory", "evidence": "little time", "reason": "short days"}],
            "narrative": "I have little time.",
            "category": "Games",
            "chosen": f"Play the quiet line {n}.",
            "rejected": f"Study forty books, {n}.",
        }
        for n in range(2)
    ]
    users = load_users(write(tmp_path, "society.jsonl", rows))
    assert [user.id for user in users] == ["q0", "q1"]
    assert users[0].examples[0].rejected == ("Study forty books, 0.",)
    prompt = dps.build_prompt(llama.hooked, users[0].examples[0])
    assert "How do I learn endgame 2?" in prompt.text
    assert "little time" not in prompt.text  # the criteria are hidden


def test_prism(tmp_path):
    def said(interaction, turn, place, text, score, chosen):
        return {
            "utterance_id": f"ut{interaction}{place}", "interaction_id": f"int{interaction}",
            "conversation_id": f"c{interaction}", "user_id": "user0", "turn": turn, "within_turn_id": place,
            "included_in_balanced_subset": True,
            "conversation_type": "unguided", "user_prompt": f"Plan picnic {interaction}", "model_response": text,
            "model_name": "m", "model_provider": "p", "score": score, "if_chosen": chosen,
        }  # fmt: skip

    rows = [
        said(n, 0, place, text, score, chosen)
        for n in range(4)
        for place, (text, score, chosen) in enumerate(
            [(f"Bring bread {n}.", 80, True), (f"Bring rain {n}.", 20, False), ("EMPTY STRING", 1, False)]
        )
    ]
    rows += [said(9, 0, 0, "Same.", 50, True), said(9, 0, 1, "Same.", 50, False), said(0, 1, 0, "Later.", 9, True)]
    with pytest.warns(UserWarning, match=r"utterances.jsonl: 1 question left out, where not one answer .*record 12 "):
        (user,) = load_users(write(tmp_path, "utterances.jsonl", rows))
    assert user.examples[0].reference == "Bring bread 2."
    assert user.examples[0].rejected == ("Bring rain 2.",)
    assert user.examples[0].input == "Plan picnic 2"


def test_personalllm_interactions(tmp_path):
    row = {"person_id": 7, "person_weight": [0.1, 0.9]}
    for j in range(1, 5):
        row |= {
            f"prompt_{j}": f"Tides {j}?",
            f"response_{j}_a": f"Moon {j}.",
            f"response_{j}_b": f"Wind {j}.",
            f"chosen_{j}": "b",
        }
    (user,) = load_users(write(tmp_path, "interactions.jsonl", [row]))
    assert (user.id, user.examples[-1].reference, user.examples[-1].rejected) == ("7", "Wind 4.", ("Moon 4.",))
    with pytest.raises(DataError, match="'a' or 'b'"):
        load_users([{**row, "chosen_2": "tie"}])
    with pytest.raises(DataError, match="interaction database"):
        load_users([{"prompt": "Tides?", "response_1": "Moon.", "response_1_model": "m", "response_1_gemma_2b": 1.0}])


def test_personamem(tmp_path, llama):
    question = {
        "persona_id": "0", "question_id": "u-1", "question_type": "suggest_new_ideas", "topic": "travel",
        "context_length_in_tokens": "900", "context_length_in_letters": "4000", "distance_to_ref_in_blocks": "1",
        "distance_to_ref_in_tokens": "300", "num_irrelevant_tokens": "0",
        "distance_to_ref_proportion_in_context": "33.30%",
        "user_question_or_message": "Ideas for May?", "correct_answer": "(b)",
        "all_options": "['(a) Ski', \"(b) It's a lake\", '(c) City', '(d) Stay']",
        "shared_context_id": "abc", "end_index_in_shared_context": "3",
    }  # fmt: skip
    contexts = [
        {
            "abc": [
                {"role": "system", "content": "Current user persona: a swimmer"},
                {"role": "user", "content": "User: I like lakes"},
                {"role": "assistant", "content": "Assistant: Noted"},
                {"role": "user", "content": "User: said only afterwards"},
            ]
        }
    ]
    questions, shared = (
        write(tmp_path, "questions_32k.csv", [question]),
        write(tmp_path, "shared_contexts_32k.jsonl", contexts),
    )
    (user,) = load_users(questions, outputs=shared)
    example = user.examples[0]
    assert (example.reference, example.rejected) == ("It's a lake", ("Ski", "City", "Stay"))
    text = dps.build_prompt(llama.hooked, example).text
    assert "User: I like lakes" in text
    assert "Assistant: Noted" in text
    assert "User: User:" not in text
    assert "afterwards" not in text
    with pytest.raises(DataError, match=r"outputs='shared_contexts_32k"):
        load_users(questions)
    with pytest.raises(DataError, match="there is no context 'abc'"):
        load_users(questions, outputs=write(tmp_path, "other.jsonl", [{"xyz": []}]))


def test_prefeval(tmp_path, llama):
    stated = {
        "preference": "I avoid loud places.",
        "question": "Where to eat in Oslo?",
        "explanation": "Bars are loud.",
    }
    options = {
        **stated,
        "violation_probability": 1.0,
        "classification_task_options": ["A calm cafe.", "A bar.", "A club.", "A fair."],
    }
    shown = {
        **stated, "implicit_query": "Any cafes?", "options": ["Quiet A", "Loud B", "Loud C", "Loud D"],
        "aligned_op": "Quiet A",
        "conversation": {
            "query": "Any cafes?", "assistant_options": "1. Quiet A 2. Loud B",
            "user_selection": "The first, for its calm.",
            "assistant_acknowledgment": "Good.",
        },
    }  # fmt: skip
    told = {
        **stated,
        "persona": "a retired pilot",
        "conversation": {"0": {"user": "It was loud.", "assistant": "Oh."}, "1": None},
    }
    mcq = write(tmp_path, "travel.json", [options])
    for rows, outputs, words in (
        ([options], None, "I avoid loud places."),
        ([stated], mcq, "I avoid loud places."),
        ([shown], mcq, "The first, for its calm."),
        ([told], mcq, "It was loud."),
    ):
        (user,) = load_users(rows, outputs=outputs)
        example = user.examples[0]
        assert (example.input, example.reference) == ("Where to eat in Oslo?", "A calm cafe.")
        assert example.rejected == ("A bar.", "A club.", "A fair.")
        assert words in dps.build_prompt(llama.hooked, example).text
        assert words not in dps.build_prompt(llama.hooked, example, "none").text
    with pytest.raises(DataError, match="mcq_options"):
        load_users([stated])
    with pytest.raises(DataError, match="file of the same topic"):
        load_users([{**stated, "question": "Another?"}], outputs=mcq)
    with pytest.raises(DataError, match="file of the same topic"):
        load_users([stated, stated], outputs=mcq)


def test_longlamp_stays_what_it_was():
    profile = [{"description": "A lamp", "overall": "5.0", "reviewText": "Bright.", "summary": "Good"}]
    row = {"reviewerId": "R1", "input": "Write a review.", "output": "I liked it.", "options": "none"}
    row["profile"] = profile
    (user,) = load_users([row])
    assert user.task.name == "longlamp-review"


def test_pairs_are_made_of_the_nearest_text_of_another_user(probe):
    made = dps.make_pairs(probe)
    texts = {document.fields["title"]: user.id for user in probe for document in user.history}
    for user in made:
        for example in user.examples:
            (lost,) = example.rejected
            assert texts[lost] != user.id
            assert 0.5 < len(lost) / len(example.reference) < 2
        evaluated = {text for example in user.examples for text in example.rejected}
        assert not evaluated & {text for example in user.discovery_examples() for text in example.rejected}


def test_pairs_of_styles_and_of_topics(probe):
    labels = {document.fields["title"]: user.labels for user in probe for document in user.history}
    for same, other in (("topic", "style"), ("style", "topic")):
        for user in dps.make_pairs(probe, same=same):
            for example in (*user.examples, *user.discovery_examples()):
                assert labels[example.rejected[0]][same] == user.labels[same]
                assert labels[example.rejected[0]][other] != user.labels[other]
    with pytest.raises(DataError, match="has no label 'age'"):
        dps.make_pairs(probe, same="age")
    with pytest.raises(DataError, match="at least two"):
        dps.make_pairs(probe[:1])


def test_no_prompt_shows_a_rejected_text(probe):
    """Also where its author's profile stands in for the own one."""
    made = dps.make_pairs(probe[:3])
    for user in made:
        for example in (*user.examples, *user.discovery_examples()[:2]):
            shown = [example.showable, *(example.showable_of(donor) for donor in made if donor.id != user.id)]
            titles = {document.fields["title"] for documents in shown for document in documents}
            assert titles
            assert not titles & {example.reference, *example.rejected}


def test_each_question_keeps_its_own_profile():
    """Texts without ids are known by what they hold."""
    row = CHOICE
    (user,) = load_users([{**row, "history": ["I like tea."]}, {**row, "history": ["I hate hot drinks."], "id": "2"}])
    shown = [[document.fields["text"] for document in example.profile] for example in user.examples]
    assert shown == [["I like tea."], ["I hate hot drinks."]]
    assert len(user.history) == 2
    twice = [{"id": "1", "text": "I like tea."}, {"id": "1", "text": "I hate tea."}]
    with pytest.raises(DataError, match="stands twice"):
        load_users([{**row, "history": twice}])


def test_pairs_are_ordered_by_their_dates():
    rows = [{**one, "date": f"2024-01-{9 - n:02d}"} for n, one in enumerate(PAIRS)]
    (user,) = load_users(rows)
    assert user.dated
    assert [example.reference for example in user.examples] == ["Walk 1 miles.", "Walk 0 miles."]


def test_choices_may_have_the_same_options_again(llama):
    rows = [
        {"user_id": "ann", "question": f"Is day {n} good?", "options": ["Yes", "No"], "answer": n % 2} for n in range(8)
    ]
    (user,) = load_users(rows)
    assert len(user.discovery_examples()) == 6
    text = dps.build_prompt(llama.hooked, user.examples[-1]).text
    assert 'the user chose "No"' in text


def test_a_profile_of_pairs_shows_what_was_preferred(llama):
    """Long prompts do not crowd the answers out, nor the profile out of its budget."""
    long = "plan it well, with many words, and nothing left out of what I said before; " * 12
    rows = [
        {**one, "prompt": one["prompt"] + long, "chosen": f"Walk {n} miles, then eat."} for n, one in enumerate(PAIRS)
    ]
    (user,) = load_users(rows)
    config = dps.PromptConfig(profile_tokens=400, task_tokens=20)
    prompt = dps.build_prompt(llama.hooked, user.examples[0], config=config)
    assert "the user preferred " in prompt.text
    assert 'preferred ""' not in prompt.text
    start, stop = prompt.spans["profile"]
    assert stop - start <= 400


def test_only_what_is_asked_for_is_read():
    """Later users' records are not looked at, and one without a history is left out."""
    broken = {"user_id": "bob", "prompt": "Plan.", "chosen": "Walk.", "rejected": "Walk."}
    assert [user.id for user in load_users([*PAIRS, broken], max_users=1)] == ["ann"]
    row = DRINK
    with pytest.warns(UserWarning, match="1 user is left out"):
        users = load_users([row, {**row, "user_id": "bob", "history": []}])
    assert [user.id for user in users] == ["ann"]


def test_documents_with_other_columns_stay_documents(probe):
    rows = [
        {"user_id": "ann", "title": f"Title {n}", "text": f"Some text {n}.", "options": [], "preference": "none"}
        for n in range(5)
    ]
    assert load_users(rows)[0].task.name == "lamp-4"


def test_profiles_of_several_kinds_are_refused():
    row = DRINK
    pairs = [{"prompt": "A meal?", "chosen": "Soup.", "rejected": "Cake."}]
    with pytest.raises(DataError, match="of one kind"):
        load_users([row, {**row, "user_id": "bob", "history": pairs}])
    with pytest.raises(DataError, match="several kinds"):
        load_users([row, {**row, "id": "2", "history": pairs}])


def test_data_frames_with_arrays_are_read():
    import numpy as np
    import pandas as pd

    row = {"user_id": "ann", "question": "A drink?", "options": np.array(["Milk", "Tea"]), "answer": "b",
           "history": np.array(["I like tea.", "It rains."])}  # fmt: skip
    (user,) = load_users(pd.DataFrame([row, {**row, "id": "2"}]))
    assert user.examples[0].reference == "Tea"


def test_pairs_of_texts_reject_nothing_of_the_users_own(probe):
    own = [dataclasses.replace(probe[1], id="twin", history=(*probe[0].history[:3], *probe[1].history)), *probe]
    for user in dps.make_pairs(own):
        titles = {document.fields["title"] for document in user.history}
        titles |= {example.reference for example in user.examples}
        for example in (*user.examples, *user.discovery_examples()):
            assert not titles & {*example.rejected}
    with pytest.raises(DataError, match="have rejected answers"):
        dps.make_pairs(dps.make_pairs(probe))


def test_a_donor_did_not_write_what_is_rejected(probe):
    made = dps.make_pairs(probe)
    author = {document.fields["title"]: user.id for user in probe for document in user.history}
    for user in made:
        for example in user.examples:
            donors = donors_of(example, made, 5, 0)
            assert author[example.rejected[0]] not in {donor.id for donor in donors}
    assert donors_of(made[0].examples[0], made[:2], 5, 0), "nobody else is there"


def test_answers_that_begin_alike_are_refused(llama):
    rows = [{**one, "rejected": one["chosen"] + " And rest."} for one in PAIRS]
    (user,) = load_users(rows)
    dps.build_prompt(llama.hooked, user.examples[0])
    config = dps.PromptConfig(response_tokens=3)
    dps.build_prompt(llama.hooked, user.examples[0], config=config)  # the NLL needs no other answer
    with pytest.raises(PromptError, match="are the same for response_tokens"):
        dps.rank_answers(llama.hooked, [user], prompt_config=config, run_config=dps.RunConfig(progress=False))


def test_rejected_answers_decide_what_a_run_is(probe, llama, tmp_path):
    made = dps.make_pairs(probe[:3])
    options = {"objective": "pair", "max_examples": 1, "run_config": dps.RunConfig(progress=False)}
    dps.score_heads(llama.hooked, made, out=tmp_path / "run", **options)
    with pytest.raises(dps.DPSLensError, match="data"):
        dps.score_heads(llama.hooked, dps.make_pairs(probe[:3], n_rejected=2), out=tmp_path / "run", **options)
