"""How a page was made, in words."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dps_lens.explorer.content import Exploration


def facts(found: "Exploration") -> list[tuple[str, str]]:
    """Settings of the run."""
    manifest = found.scores.manifest
    model, prompt = manifest.get("model", {}), manifest.get("prompt", {})
    size = f"{model.get('n_layers')} layers × {model.get('n_heads')} heads, {model.get('dtype')}"
    rows = [
        ("model", f"{model.get('name')}, {size}"),
        (
            "ablation",
            f"{manifest.get('ablation')}, positions {manifest.get('positions')}, contrast {manifest.get('contrast')}",
        ),
        ("sign", str(manifest.get("sign", ""))),
        ("prompts", ", ".join(f"{name} {value}" for name, value in prompt.items())),
        ("outlined heads", str(found.heads)),
    ]
    if found.cost is not None:
        controls, seed = found.cost.manifest.get("controls"), found.cost.manifest.get("seed")
        rows.append(("controls", f"{len(found.cost.draws)} random sets, {controls}, seed {seed}"))
    if found.grid is not None:
        about, who = found.grid.manifest, "other users" if len(found.scores.users) > 1 else "the user's older texts"
        rows.append(
            (
                "texts",
                f"rule {about['rule']}, greedy, at most {about['max_new_tokens']} tokens; heads chosen by {who}",
            )
        )
    libraries = model.get("libraries", {})
    return [*rows, ("libraries", ", ".join(f"{name} {version}" for name, version in libraries.items()))]
