"""The trait: who shouts, and how loud a text is."""

from experiments.q09_safety import Safety, capitals, plan, shouted


def test_every_second_headline_is_shouted(probe):
    user = shouted(probe[0], every=2)
    loud = [document.fields["title"].isupper() for document in user.history]
    assert loud[-1]
    assert sum(loud) == len(loud) / 2
    assert [d.fields["title"].isupper() for d in user.examples[0].profile] == loud
    assert user.examples[0].reference == probe[0].examples[0].reference
    assert all(document.fields["title"].isupper() for document in shouted(probe[0], every=1).history)


def test_capitals_are_counted_among_letters():
    assert capitals("AB cd 12!") == 0.5
    assert capitals("12!") == 0.0


def test_the_plan_names_every_text():
    assert len(plan(Safety(n_random=2))) == 9
