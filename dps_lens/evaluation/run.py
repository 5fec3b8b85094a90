"""The benchmark table: methods × metrics on the users' own tasks, settings chosen on discovery examples."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from dps_lens.analysis.rankings import Select
from dps_lens.analysis.set_sweep import shared_settings
from dps_lens.data import PromptConfig, User
from dps_lens.evaluation.bench import Bench
from dps_lens.evaluation.methods import Asked, find_method
from dps_lens.evaluation.result import Evaluation
from dps_lens.heads import HeadSet
from dps_lens.model import HookedModel
from dps_lens.runs import Engine, RunFolder


def evaluate(
    model: HookedModel,
    users: Sequence[User],
    methods: Mapping[str, Asked],
    *,
    strengths: Sequence[float] = (0.25, 0.5, 1.0),
    ks: Sequence[int] = (10,),
    layers: Sequence[int] | None = None,
    choose_on: int = 1,
    vector_examples: int | None = 8,
    select: "Select | Mapping[str, Select]" = "global",
    exclude: Mapping[str, HeadSet] | None = None,
    max_examples: int | None = None,
    max_new_tokens: int | None = None,
    prompt: PromptConfig | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    force: bool = False,
    engine: Engine | None = None,
    progress: bool = True,
) -> Evaluation:
    """Let every method answer the users' evaluation examples, and measure the answers.

    All methods share the prompts and the decoding loop of `generate`, greedily. What a method leaves open (strength,
    K, layer) is chosen for all users at once, by the task's first metric on discovery examples.

    | method | |
    |---|---|
    | `"plain"` | the task input alone |
    | `"rag"` | with the profile: the user's documents that retrieval finds |
    | `"prompt"` | with the model's own description of the user in place of the profile |
    | `"cad"`, `"cos"`, `"dola"` | rules of `generate`, with the profile |
    | `("dps", scores)`, `("decore", scores)`, `("amplify", scores)`, … | rules of heads, with the profile |
    | `"stylevector"`, `"steerx"` | vectors of the user (`style_vector`, `steerx_vector`), without the profile |
    | `"lora"` | the model with the user's LoRA, trained on discovery examples, without the profile |
    | `"rag+stylevector"`, `"rag+steerx"`, `"rag+lora"` | the same, with the profile |
    | `("dps+cad", scores)`, … | stacks |

    Args:
        model: a hooked model.
        users: of one task; their evaluation examples are answered.
        methods: name → method, in the order of the table.
        strengths: the grid of γ and α, and of what a LoRA's change is multiplied by.
        ks: the grid of numbers of heads.
        layers: the grid of a vector's layer; a third, half and two thirds of the way up by default.
        choose_on: the newest so many discovery examples of each user choose; 0 where no method has a choice.
        vector_examples: the newest so many discovery examples that a vector or LoRA is made of; those that choose are
            left out while choosing.
        select: as in `ablation_curve`; with `"user"`, heads are ranked by the discovery examples that also choose.
        exclude: as in `ablation_curve`.
        max_examples: the newest so many evaluation examples of each user.
        max_new_tokens: by default what the task needs.
        prompt: how prompts are built; by default as for the scores.
        seed: of the folds that select heads.
        out: a run folder, where the evaluation is saved; a run that is started again there resumes.
        force: drop what `out` holds.
        engine: as in `score_heads`; a shard answers for its users, with settings chosen on all of them.
        progress: show progress bars.

    Raises:
        EvaluationError: users of several tasks, an unknown method, nothing to choose on, a layer outside the model, or
            a reference that is not of the task's form.
        ScoreError: as `ablation_curve`.
        SteeringError: LoRA without peft, or on a `HookedTransformer`.
    """
    if engine is not None:
        engine.start(model)
    depth = model.cfg.n_layers
    grid = tuple(dict.fromkeys((depth // 3, depth // 2, 2 * depth // 3))) if layers is None else tuple(layers)
    found = {name: find_method(name, asked, strengths, ks, grid) for name, asked in methods.items()}
    families = {name: method.family for name, method in found.items() if method.family is not None}
    shared = shared_settings("evaluate", families, ablation=None, positions="response", prompt=prompt)
    bench = Bench(
        model, list(users), found, tuple(ks), choose_on, vector_examples, select, exclude or {}, max_examples,
        max_new_tokens, shared["prompt"], seed,
    )  # fmt: skip
    manifest = bench.fingerprint()
    folder = RunFolder(out, manifest, force=force) if out is not None else None
    if out is not None:
        Evaluation.remove(out)
    evaluation = bench.run(folder, manifest, engine, progress)
    if out is not None:
        evaluation.save(out)
    return evaluation
