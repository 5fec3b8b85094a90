"""What holds for all users: ids, texts, dates and scripts are drawn."""

import random

import hypothesis.strategies as st
from conftest import make_tokenizer
from hypothesis import HealthCheck, assume, given, settings

from dps_lens.data import PromptConfig, build_prompt, load_users
from dps_lens.data.conditions import donors_of
from dps_lens.data.examples import by_key, data_digest
from dps_lens.data.same import normalised


class Holder:
    """A model, as far as prompt building looks at it."""

    tokenizer, cfg = make_tokenizer(), type("Config", (), {"n_ctx": 10**6})()


MODEL = Holder()
CONFIG = PromptConfig(items=6, profile_tokens=900, task_tokens=None, response_tokens=None)
DERANDOMIZED = settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
WORDS = {
    "latin": ["river", "stone", "window", "garden", "paper", "letter", "wheel", "bread", "cloud", "ladder"],
    "cyrillic": ["река", "камень", "окно", "сад", "бумага", "письмо", "колесо", "хлеб", "облако", "лестница"],
    "han": ["河流", "石头", "窗户", "花园", "报纸", "信件", "车轮", "面包", "白云", "梯子"],
    "thai": ["แม่น้ำ", "ก้อนหิน", "หน้าต่าง", "สวน", "กระดาษ", "จดหมาย", "ล้อ", "ขนมปัง", "เมฆ", "บันได"],
}
IDS = st.text(alphabet='ab|\\" 1é', min_size=1, max_size=3)
CHANGES = (
    str.upper,
    lambda text: text.replace(" ", "  "),
    lambda text: f"«{text}»…",
    lambda text: text + " " + text[::-1],
    lambda text: "As I said: " + text,
)
DATES = (
    None,
    lambda n: f"{2000 + n}",
    lambda n: f"2020-{n + 1}-{n % 3 + 1}",
    lambda n: f"{n + 1}/{n + 13}/2020",
    lambda n: 1_500_000_000 + 86_400 * n,
    lambda n: f"{n + 1} 4, 2012",
)


@st.composite
def histories(draw, user):
    """The records of a user; some texts stand there twice, changed in ways that leave them the same."""
    words, date = draw(st.sampled_from(sorted(WORDS))), draw(st.sampled_from(DATES))
    ids = draw(st.lists(IDS, min_size=5, max_size=7, unique=True))
    seed, between = random.Random(draw(st.integers(0, 2**20))), "" if words == "han" else " "
    records: list[dict] = []
    originals: list[dict] = []
    for name in ids:
        title, text = (between.join(seed.choices(WORDS[words], k=k)) for k in (24, 30))
        if originals and draw(st.booleans()):
            source, change = draw(st.sampled_from(originals)), draw(st.sampled_from(CHANGES))
            title, text = draw(st.sampled_from([(change(source["title"]), text), (title, change(source["text"]))]))
        else:
            originals.append({"title": title, "text": text})
        dated = {"date": date(seed.randrange(9))} if date else {}
        records.append({"user_id": user, "id": name, "title": title, "text": text, **dated})
    return records


USERS = st.lists(IDS, min_size=2, max_size=3, unique=True).flatmap(lambda ids: st.tuples(*map(histories, ids)))


def everything(users):
    """Examples of both kinds, and what is shown for each."""
    for user in users:
        for example in (*user.discovery_examples(), *user.examples):
            yield example, ["own", *donors_of(example, users, 1, 0)]


def prompt_of(example, shown):
    """None where every document holds what is asked for."""
    there = example.showable if shown == "own" else example.showable_of(shown)
    return build_prompt(MODEL, example, shown, config=CONFIG) if there else None


@DERANDOMIZED
@given(USERS)
def test_units_are_one_to_one_with_examples(histories):
    users = load_users([record for own in histories for record in own])
    for kind in (lambda user: user.discovery_examples(), lambda user: user.examples):
        examples = [example for user in users for example in kind(user)]
        assert [*by_key(examples).values()] == examples


@DERANDOMIZED
@given(USERS)
def test_no_prompt_holds_its_own_answer(histories):
    users = load_users([record for own in histories for record in own])
    for example, shown in everything(users):
        assert len(normalised(example.reference)) >= 40
        for one in shown:
            if prompt := prompt_of(example, one):
                assert normalised(example.reference) not in normalised(prompt.text)
                assert prompt.text.count(example.input.strip()) == 1


@DERANDOMIZED
@given(USERS, st.randoms(use_true_random=False))
def test_the_order_of_users_changes_nothing(histories, shuffle):
    mixed = [own.copy() for own in shuffle.sample(histories, len(histories))]
    records = []
    while any(mixed):
        records.append(shuffle.choice([own for own in mixed if own]).pop(0))
    first = load_users([record for own in histories for record in own])
    second = sorted(load_users(records), key=lambda user: [own.id for own in first].index(user.id))
    for (example, shown), (other, others) in zip(everything(first), everything(second), strict=True):
        assert example == other
        assert [getattr(one, "id", one) for one in shown] == [getattr(one, "id", one) for one in others]
        for one, two in zip(shown, others, strict=True):
            built, again = prompt_of(example, one), prompt_of(other, two)
            assert (built is None) == (again is None)
            assert built is None or built.tokens.tolist() == again.tokens.tolist()
    asked = [example for user in first for example in user.examples]
    assert data_digest(first, asked) == data_digest(second, [one for user in second for one in user.examples])


@DERANDOMIZED
@given(histories("u"))
def test_a_profile_is_strictly_older_where_there_are_dates(records):
    (user,) = load_users(records)
    assume(user.dated)
    dates = {document.id: document.date for document in user.history}
    assert [*dates.values()] == sorted(dates.values())
    for example in user.discovery_examples():
        assert all(document.date < dates[example.id] for document in example.profile)
    if len({record["date"] for record in records}) == len(records):
        assert load_users(sorted(records, key=lambda record: record["title"]))[0].history == user.history
