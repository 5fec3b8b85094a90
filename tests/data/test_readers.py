"""Which users a file gives, and which documents are one."""

import json
import time
import warnings

import pytest
from conftest import write_jsonl

from dps_lens.data import PromptConfig, build_prompt, load_users
from dps_lens.data.conditions import donors_of
from dps_lens.data.examples import by_key, data_digest, key_of, unit_key
from dps_lens.data.same import SameTexts, asked_parts, document_parts, normalised
from dps_lens.data.tasks import TASKS
from dps_lens.errors import DataError, PromptError

TEXTS = [
    "The oven was cold and nobody had set the timer for the bread.",
    "We walked along the river until the rain came.",
    "A letter came from the council about the bins.",
    "The cat slept on the newspaper all afternoon.",
    "My neighbour lent me a ladder for the gutters.",
    "The train was late so I read one page three times.",
    "I planted beans beside the old wall on Sunday.",
    "The radio broke and I mended it with tape.",
]


def documents(user="u", n=8, **more):
    return [
        {
            "user_id": user,
            "id": f"d{i}",
            "title": f"Heading number {i} of {user}",
            "text": TEXTS[i % 8] + f" So it was, {user}.",
        }
        | more
        for i in range(n)
    ]


def test_a_text_under_another_id_never_stands_in_its_own_prompt(llama):
    records = documents()
    records[3] = records[1] | {"id": "d3"}
    records[7] = {**records[2], "id": "d7", "title": "HEADING — number 2, of u!", "text": records[2]["text"].upper()}
    user, other = load_users(records + documents("v"))
    thief = load_users([{**record, "user_id": "w"} for record in records] + documents("v"))[0]
    config = PromptConfig(items=8, profile_tokens=800)
    for example in (*user.discovery_examples(), *user.examples):
        for shown in ("own", other, thief):
            if shown is thief:
                with pytest.raises(PromptError, match="no documents to show"):
                    build_prompt(llama.hooked, example, shown, config=config)
                continue
            prompt = build_prompt(llama.hooked, example, shown, config=config)
            assert normalised(example.reference) not in normalised(prompt.text)
    assert [example.id for example in user.discovery_examples()] == ["d0", "d1", "d3", "d4", "d5"]
    d1 = user.discovery_examples()[1]
    assert [document.id for document in d1.profile] == ["d0", "d4", "d5"]
    assert [document.id for document in user.examples[1].showable] == ["d0", "d1", "d3", "d4", "d5"]


def test_equal_answers_are_equal_texts_only_where_answers_are_free():
    reviews = TASKS["lamp-3"]
    assert document_parts(reviews, {"text": "Lovely gloves!", "score": "5"}) == ("lovelygloves",)
    assert asked_parts(reviews, "What … review: Lovely GLOVES.", "5") == ("lovelygloves",)
    headlines = TASKS["lamp-4"]
    assert document_parts(headlines, {"text": "Some words.", "title": "Bees"}) == ("somewords", "bees")


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("It's  RAINING - again…", "it’s raining again", True),
        ("Ｆｕｌｌ ｗｉｄｔｈ", "full width", True),
        ("😀", "😭", False),
        ("!!!", "???", False),
        ("a" * 39, "a" * 39 + "b", False),
        ("a" * 40, "zz" + "a" * 40, True),  # a quotation
        ("ab" * 60, "ab" * 45 + "cd" * 15, True),  # a revision keeps its first half, at least 80 characters
        ("ab" * 60, "ab" * 39 + "cd" * 21, False),
        ("ab" * 100, "ab" * 45 + "cd" * 55, False),
    ],
)
def test_what_counts_as_the_same_text(one, other, same):
    first, second = (normalised(one),), (normalised(other),)
    for here, there in ((first, second), (second, first)):
        texts = SameTexts([("something else",), here])
        assert frozenset().union(*texts.like(there)) == (frozenset([1]) if same else frozenset())
    within = SameTexts([first, ("something else",), second])
    assert frozenset().union(*within.like_own(0)) == (frozenset([0, 2]) if same else frozenset([0]))
    assert frozenset().union(*within.like_own(2)) == (frozenset([0, 2]) if same else frozenset([2]))


def test_ids_are_unique_within_a_user_only(llama):
    users = load_users(documents("u") + documents("v") + documents("w"))
    example = users[0].discovery_examples()[0]
    prompt = build_prompt(llama.hooked, example, users[1])
    assert len(prompt.shown) == 6
    assert 'of v"' in prompt.text
    assert len(by_key([one for user in users for one in user.discovery_examples()])) == 18
    with pytest.raises(DataError, match="example 'd0' of user 'u' stands twice"):
        by_key([example, example])
    assert key_of("a|b", "c") != key_of("a", "b|c")
    assert unit_key(example) == "u|d0"


def test_donors_do_not_depend_on_the_order_of_users():
    users = load_users([record for name in "uvwxyz" for record in documents(name)])
    for example in users[0].examples:
        drawn = [user.id for user in donors_of(example, users, 3, 0)]
        assert drawn == [user.id for user in donors_of(example, users[::-1], 3, 0)]
    first, second = (donors_of(users[i].examples[0], users[2:], 2, 0) for i in (0, 1))
    assert first != second, "equal ids of two users are not one example"


def test_ids_that_stand_for_two_documents_are_refused():
    profile = [{"id": str(i), "title": f"t{i}", "text": f"words {i}"} for i in range(4)]
    asked = {"user_id": "u", "input": "Generate a headline for the following article: x", "output": "y"}
    user = load_users([asked | {"profile": profile}, asked | {"profile": profile[2:]}])[0]
    assert [len(example.profile) for example in user.examples] == [4, 2]
    changed = [profile[0] | {"text": "other words"}]
    with pytest.raises(DataError, match=r"record 1, profile, record 0: field 'id' '0' stands twice for user 'u'"):
        load_users([asked | {"profile": profile}, asked | {"profile": changed}])
    with pytest.raises(DataError, match=r"profile, record 4: field 'id' '0' stands twice"):
        load_users([asked | {"profile": profile + changed}])
    bare = [{name: value for name, value in record.items() if name != "id"} for record in documents()]
    ids = [document.id for document in load_users([*bare, bare[0]])[0].history]
    assert len(set(ids)) == 7


def test_answers_that_stand_twice_are_refused(tmp_path):
    question = {
        "id": "q",
        "input": "Generate a headline for the following article: x",
        "profile": [{"title": "t", "text": "x"}],
    }
    (tmp_path / "dev_questions.json").write_text(json.dumps([question]))
    answers = [{"id": "q", "output": "a"}, {"id": "q", "output": "b"}]
    (tmp_path / "dev_outputs.json").write_text(json.dumps(answers))
    with pytest.raises(
        DataError, match="dev_outputs.json, record 1: field 'id' 'q' stands twice, with different answers"
    ):
        load_users(tmp_path / "dev_questions.json")


def test_short_users_are_left_out_with_a_count(tmp_path):
    records = documents("a", 2) + documents("b") + documents("c", 1) + documents("d") + [{"user_id": "e", "id": 1}]
    path = write_jsonl(tmp_path / "docs.jsonl", records)
    with pytest.warns(
        UserWarning, match=r"docs.jsonl: 2 users are left out \('a', 'c'\); .*user 'a' has 2 documents"
    ) as said:
        assert [user.id for user in load_users(path, max_users=2)] == ["b", "d"]
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [user.id for user in load_users(records[2:], max_users=1)] == ["b"], "others are not looked at"
    with pytest.raises(DataError, match="user 'a' has 2 documents; more than 2"):
        load_users(path, max_users=2, strict=True)
    with pytest.raises(DataError, match="record 0: field 'user_id' is missing"):
        load_users([{"text": "x"}])
    with pytest.raises(DataError, match="max_users 0 is not"):
        load_users(path, max_users=0)
    with pytest.raises(DataError, match="task 'lamp-9' is unknown"):
        load_users(documents(), task="lamp-9")


def test_a_question_without_a_profile_does_not_stop_the_file():
    asked = {"input": "Generate a headline for the following article: x", "output": "y"}
    profile = [{"id": str(i), "title": f"t{i}", "text": f"words {i}"} for i in range(4)]
    rows = [asked | {"user_id": "a", "profile": []}, asked | {"user_id": "b", "profile": profile}]
    with pytest.warns(UserWarning, match=r"1 user is left out \('a'\)"):
        assert [user.id for user in load_users(rows)] == ["b"]
    with pytest.raises(DataError, match="field 'profile' is empty"):
        load_users(rows, strict=True)


def test_digests_follow_the_documents_that_are_shown():
    from dataclasses import replace

    (user,) = load_users(documents())
    example = user.examples[0]
    loud = [replace(d, fields={**d.fields, "title": d.fields["title"].upper()}) for d in example.profile]
    digests = {data_digest([user], [one]) for one in (example, replace(example, profile=tuple(loud)), user.examples[1])}
    assert len(digests) == 3
    assert data_digest([user], [example]) in digests


def seconds_for(n):
    records = [
        {"user_id": "u", "id": str(i), "date": f"{1900 + i // 300}-{1 + i % 300 // 28}-{1 + i % 28}",
         "title": f"No {i}", "text": f"Entry {i}: " + " ".join(TEXTS[(i * k) % 8] for k in range(1, 5))}
        for i in range(n)
    ]  # fmt: skip
    begun = time.process_time()
    examples = load_users(records)[0].discovery_examples()
    assert len(examples) == n - 5
    return time.process_time() - begun


@pytest.mark.full
def test_time_grows_with_the_number_of_documents():
    seconds_for(200)
    assert seconds_for(8000) < 8 * max(seconds_for(2000), 0.05)
