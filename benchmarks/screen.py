"""How much of the exact top 20 screening finds, and at what share of the exact cost.

    python benchmarks/screen.py --users dev_questions.json --positions all --max-users 8

Exact scores are computed once and kept in `--out`, or read from a finished run by `--exact`. Cost is
counted in block passes: a head of layer l costs the layers from l up; attribution costs 3 passes through
all layers.
"""

import argparse
import warnings
from pathlib import Path

import torch
from torch import Tensor

import dps_lens as dps
from dps_lens.selection import score_settings

TOP = 20


def cost(chosen: Tensor) -> float:
    """Share of the exact cost that the chosen heads take, attribution included."""
    n_layers, n_heads = chosen.shape[-2:]
    passes = torch.arange(n_layers, 0, -1.0)[:, None].expand(n_layers, n_heads)
    return (float((chosen * passes).sum((-1, -2)).mean()) + 3 * n_layers) / float(passes.sum())


def chosen_heads(estimate: Tensor, exact_layers: int, confirm: float) -> Tensor:
    """Heads that `score_heads(method="screened")` would measure."""
    chosen = torch.zeros_like(estimate, dtype=torch.bool)
    chosen[:, :exact_layers] = True
    rest = estimate.masked_fill(chosen, -torch.inf).flatten(1)
    index = rest.topk(round(confirm * rest.shape[1])).indices
    return chosen.flatten(1).scatter(1, index, True).reshape(chosen.shape)


def recall(exact: Tensor, mixed: Tensor) -> float:
    """Mean share of each example's exact top 20 among the top 20 of `mixed`."""
    tops = [values.flatten(1).topk(TOP).indices.tolist() for values in (exact, mixed)]
    return sum(len(set(a) & set(b)) / TOP for a, b in zip(*tops, strict=True)) / len(exact)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", default="probe")
    parser.add_argument("--positions", choices=["response", "all"], default="response")
    parser.add_argument("--against", choices=["no_profile", "none"], default="no_profile")
    parser.add_argument("--max-users", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("runs/screen"))
    parser.add_argument("--exact", type=Path, help="a run of exact scores, whose settings are taken")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    model = dps.load_model()
    users = [user for user in dps.load_users(arguments.users) if user.discovery_examples()][: arguments.max_users]
    if arguments.exact:
        exact = dps.HeadScores.load(arguments.exact)
        options = score_settings(exact)
        del options["method"]
    else:
        against = None if arguments.against == "none" else arguments.against
        options = {"ablation": "zero", "max_examples": 1, "positions": arguments.positions, "against": against}
        folder = arguments.out / f"{Path(arguments.users).stem}-{arguments.positions}-{arguments.against}"
        exact = dps.score_heads(model, users, method="exact", out=folder, **options)
    exact = exact.without({*exact.users} - {user.id for user in users})
    estimated = dps.score_heads(model, users, method="attribution", **options)
    about = f"positions {exact.manifest['positions']}, against {exact.manifest['against']}"
    print(f"{len(exact.values)} examples of {len(users)} users, {about}")
    print(f"attribution alone: recall of the top {TOP} {dps.screening_recall(estimated, exact, k=TOP):.2f}")
    screened = dps.score_heads(model, users, method="screened", **options)
    print(f"method='screened', its defaults: {dps.screening_recall(screened, exact, k=TOP):.3f}")
    print("exact layers  confirmed  cost   recall (per example)  recall (mean over examples)")
    mean = exact.values.mean(0, keepdim=True)
    for exact_layers in (0, 1, 2, 3):
        for confirm in (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4):
            chosen = chosen_heads(estimated.values, exact_layers, confirm)
            mixed = torch.where(chosen, exact.values, estimated.values)
            print(
                f"{exact_layers:12d}  {confirm:9.2f}  {cost(chosen):4.2f}  {recall(exact.values, mixed):20.2f}  "
                f"{recall(mean, mixed.mean(0, keepdim=True)):.2f}"
            )


if __name__ == "__main__":
    main()
