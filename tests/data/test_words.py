"""Words of any script, and BM25 over parts of a pool; the oracles are counted by hand or by rank_bm25."""

import random

import numpy as np
import pytest
from rank_bm25 import BM25Okapi

from dps_lens.data import Document, load_users
from dps_lens.data.bm25 import Bm25
from dps_lens.data.documents import Pool, Profile
from dps_lens.data.retrieval import retrieve
from dps_lens.data.tasks import TASKS
from dps_lens.data.words import foreign_share, retrieval_words, script_words, tokens_for
from dps_lens.errors import DataError


@pytest.mark.parametrize(
    ("text", "words", "pairs"),
    [
        ("It's RAINING, again: 3.5!", ["it", "s", "raining", "again", "3", "5"], None),
        ("Мама мыла раму!", ["мама", "мыла", "раму"], None),
        ("बारिश हो रही है।", ["बारिश", "हो", "रही", "है"], None),
        ("비가 온다", ["비가", "온다"], None),
        ("今天天气", ["今", "天", "天", "气"], ["今天", "天天", "天气"]),
        ("雨だ、ラーメン", ["雨", "だ", "ラ", "ー", "メ", "ン"], ["雨だ", "ラー", "ーメ", "メン"]),
        ("ผมรักคุณ", ["ผ", "ม", "รั", "ก", "คุ", "ณ"], ["ผม", "มรั", "รัก", "กคุ", "คุณ"]),
        ("GPT模型 x", ["gpt", "模", "型", "x"], ["gpt", "模型", "x"]),
        ("ຂ້ອຍ ខ្ញុំ ကျ", None, None),
        ("— … !", [], None),
    ],
)
def test_words_of_a_script(text, words, pairs):
    if words is None:
        assert all(len(word) <= 5 for word in script_words(text)), "single characters with their marks"
        assert "".join(script_words(text)) == text.replace(" ", "")
    else:
        assert script_words(text) == words
        assert script_words(text, pairs=True) == (words if pairs is None else pairs)


def test_whitespace_tokens_are_those_of_lamp():
    assert retrieval_words("It's RAINING,  again!", "whitespace") == ["It's", "RAINING,", "again!"]
    assert tokens_for(["Rain again.", "Дождь", "비가 온다"]) == "whitespace"
    assert tokens_for(["今天下雨", "rain"]) == "script"
    assert tokens_for([]) == "whitespace"
    assert foreign_share(["ab é", "1 2"]) == pytest.approx(1 / 3)
    assert foreign_share(["1 2"]) == 0


def test_bm25_of_a_part_is_that_of_its_documents_alone():
    draw = random.Random(0)
    words = [f"w{number}" for number in range(30)]
    corpus = [draw.choices(words, weights=range(30, 0, -1), k=draw.randint(1, 40)) for _ in range(25)]
    index = Bm25(corpus)
    for stop, without in [(25, []), (25, [7]), (25, [0, 3, 24]), (10, []), (12, [2, 11]), (1, [])]:
        kept = [place for place in range(stop) if place not in without]
        query = draw.choices([*words, "unknown"], k=12)
        expected = BM25Okapi([corpus[place] for place in kept]).get_scores(query)
        np.testing.assert_allclose(index.scores(query, stop, without)[kept], expected, rtol=1e-12, atol=1e-12)
    assert Bm25([[], []]).scores(["a"]).tolist() == [0, 0]


def test_profiles_of_one_pool_share_its_counts(monkeypatch):
    documents = tuple(Document(str(i), {"title": f"t{i}", "text": f"rain number {i}"}) for i in range(6))
    pool, task, made = Pool(documents, TASKS["lamp-4"]), TASKS["lamp-4"], []
    monkeypatch.setattr("dps_lens.data.documents.Bm25", lambda words: made.append(len(words)) or Bm25(words))
    for left in range(6):
        profile = Profile(pool, without=[frozenset([left])])
        found = retrieve(profile, f"number {left}", 5, task=task)
        assert [profile[place] for place in range(-5, 5)] == 2 * [*profile]
        assert found == retrieve([d for d in documents if d.id != str(left)], f"number {left}", 5, task=task)
    assert made.count(6) == 1


CHINESE = ["今天下雨我在家看书", "周末我们去爬山", "新买的自行车坏了", "妈妈做的饺子很好吃", "昨天的电影太长了"]


def test_retrieval_finds_words_where_there_are_no_spaces(unchecked):
    records = [{"user_id": "u", "id": f"d{i}", "title": f"第{i}篇", "text": text} for i, text in enumerate(CHINESE * 2)]
    history = load_users(records)[0].history[:5]
    task = TASKS["lamp-4"]
    for place, query in ((2, "我的自行车"), (3, "吃饺子"), (4, "看了一部电影")):
        assert retrieve(history, query, 1, task=task)[0] is history[place]
        assert retrieve(history, query, 1, task=task, tokens="script")[0] is history[place]
        # Without spaces every document is one word, and the first comes first.
        assert retrieve(history, query, 1, task=task, tokens="whitespace")[0] is history[0]
    with pytest.raises(DataError, match="'words' are unknown; use 'auto'"):
        retrieve(history, "x", 1, task=task, tokens="words")
