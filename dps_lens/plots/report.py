"""One self-contained HTML page of a run: heatmap, top heads, ablation cost, steered text."""

import math
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dps_lens.analysis import AblationCost
from dps_lens.errors import ScoreError
from dps_lens.files import write_text
from dps_lens.plots.heatmap import heatmap
from dps_lens.scores import HeadScores


def write_report(
    path: str | Path,
    scores: HeadScores,
    cost: AblationCost,
    texts: Sequence[Mapping[str, str]],
    *,
    title: str = "Preference Heads",
    steering: str = "DPS",
) -> Path:
    """Write the page; it opens without a network and runs no script but its own figure's.

    Args:
        path: of the HTML file.
        scores: profile-specific scores.
        cost: of ablating the top heads.
        texts: `user`, `reference`, `plain` and `steered` of each example shown.
        title: of the page.
        steering: how the steered texts were made.
    """
    from jinja2 import Environment, PackageLoader, select_autoescape

    environment = Environment(
        loader=PackageLoader("dps_lens", "plots"), autoescape=select_autoescape(default=True, default_for_string=True)
    )
    baseline = str(scores.manifest["contrast"])
    if baseline not in scores.components:
        raise ScoreError("write_report: the report compares with and without the profile; use scores with a contrast")
    frame = scores.to_frame().head(len(cost.heads)).rename(columns={baseline: "baseline"})
    figure = heatmap(scores, heads=cost.heads)
    page = environment.get_template("report.html.jinja").render(
        title=title,
        lead=f"{len(scores.users)} users, {len(scores.user_ids)} discovery examples, {len(cost.user_ids)} held out.",
        # Plotly's own markup; it escapes "<" inside the JSON of the figure.
        heatmap=_safe(figure.to_html(full_html=False, include_plotlyjs=True, config={"displayModeBar": False})),
        baseline=baseline.replace("_", " "),
        top=frame.to_dict("records"),
        cost=cost.to_frame().to_dict("records"),
        verdict=verdict(cost),
        texts=texts,
        steering=steering,
        facts=_facts(scores, cost),
    )
    write_text(path, page)
    return Path(path)


def verdict(cost: AblationCost) -> str:
    """The sentences that the held-out numbers support."""
    frame = cost.to_frame()
    rows = {(row["ablated"], row["measure"]): row for row in frame.to_dict("records")}
    gain, k = rows["full model", "gain"], len(cost.heads)
    if math.isnan(gain["low"]):
        return "One user gives no interval over users, so nothing is claimed."
    if not gain["low"] > 0:
        return f"Here the profile does not reliably help the model (gain {_words(gain)}); there is little to take."
    if not cost.draws:
        return f"The profile helps the model (gain {_words(gain)}); without random heads nothing is claimed of these."
    taken, harm = rows["difference", "taken"], rows["difference", "harm"]
    if taken["low"] > 0:
        first = f"The top {k} heads take more of the gain than random heads of the same layers, by {_words(taken)}."
    elif taken["high"] < 0:
        first = f"The top {k} heads take less of the gain than random heads of the same layers ({_words(taken)})."
    else:
        first = f"The top {k} heads cannot be told from random heads of the same layers ({_words(taken)})."
    if harm["low"] > 0:
        return (
            f"{first} They also harm the model where there is no profile, more than random heads do ({_words(harm)})."
        )
    return f"{first} Where there is no profile they harm the model no more than random heads ({_words(harm)})."


def _words(row: Mapping[Hashable, Any]) -> str:
    return f"{row['mean']:.3f} nats per token, interval {row['low']:.3f} to {row['high']:.3f}"


def _facts(scores: HeadScores, cost: AblationCost) -> list[tuple[str, str]]:
    manifest = scores.manifest
    model, prompt = manifest["model"], manifest["prompt"]
    return [
        ("model", f"{model['name']}, {model['n_layers']} layers × {model['n_heads']} heads, {model['dtype']}"),
        ("ablation", f"{manifest['ablation']}, positions {manifest['positions']}, contrast {manifest['contrast']}"),
        ("sign", manifest["sign"]),
        ("prompts", ", ".join(f"{name} {value}" for name, value in prompt.items())),
        ("heads tested", str(cost.heads)),
        ("controls", f"{len(cost.draws)} random sets, {cost.manifest.get('controls')}, seed {cost.manifest['seed']}"),
        ("libraries", ", ".join(f"{name} {version}" for name, version in model["libraries"].items())),
    ]


def _safe(html: str) -> Any:
    from markupsafe import Markup

    return Markup(html)
