"""How much of the exact ranking a screened or estimated run finds."""

from dps_lens.errors import ScoreError
from dps_lens.scores import HeadScores

_SETTINGS = (
    "model",
    "against",
    "ablation",
    "objective",
    "positions",
    "prompt_config",
    "discovery",
    "seed",
    "direction",
)


def screening_recall(screened: HeadScores, exact: HeadScores, *, k: int = 20) -> float:
    """Mean share of each example's exact top `k` among its screened top `k`; noted in `screened.manifest`.

    Args:
        screened: of `score_heads(…, method="screened")` or `"attribution"`.
        exact: of the same examples, `method="exact"`; more examples do no harm.
        k: size of the top.

    Raises:
        ScoreError: `exact` holds estimates, lacks an example, or differs in another setting.
    """
    if not bool(exact.exact.all()):
        raise ScoreError("screening_recall: the second scores hold estimates; pass exact scores")
    for key in _SETTINGS:
        one, two = screened.manifest.get(key), exact.manifest.get(key)
        if one != two:
            raise ScoreError(f"screening_recall: {key} is {one!r} and {two!r}; score both with the same settings")
    rows = {name: row for row, name in enumerate(zip(exact.user_ids, exact.example_ids, strict=True))}
    shares = []
    for row, name in enumerate(zip(screened.user_ids, screened.example_ids, strict=True)):
        if name not in rows:
            raise ScoreError(f"screening_recall: example {name[1]!r} of user {name[0]!r} is not in the exact scores")
        tops = [
            set(values.flatten().topk(k).indices.tolist())
            for values in (screened.values[row], exact.values[rows[name]])
        ]
        shares.append(len(tops[0] & tops[1]) / k)
    recall = sum(shares) / len(shares)
    screened.manifest["recall"] = {"k": k, "recall": recall, "n_examples": len(shares)}
    return recall
