"""The benchmark table: methods × metrics on the users' own tasks, settings chosen on discovery examples."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from dps_lens.data import PromptConfig, User
from dps_lens.evaluation.bench import Bench, EvaluateConfig
from dps_lens.evaluation.methods import Asked, find_method
from dps_lens.evaluation.metrics import MetricLike, find_metrics
from dps_lens.evaluation.result import Evaluation
from dps_lens.model import HookedModel
from dps_lens.selection import inherited
from dps_lens.work import Engine, Run, RunConfig


def evaluate(
    model: HookedModel,
    users: Sequence[User],
    methods: Mapping[str, Asked],
    *,
    metrics: Sequence[MetricLike] | None = None,
    strengths: Sequence[float] = (0.25, 0.5, 1.0),
    ks: Sequence[int] = (10,),
    max_examples: int | None = None,
    max_new_tokens: int | None = None,
    prompt_config: PromptConfig | None = None,
    evaluate_config: EvaluateConfig | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    engine: Engine | None = None,
    run_config: RunConfig | None = None,
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
    | `("head_vector", scores)` | a vector at each of these heads (`head_vectors`), without the profile |
    | `"lora"` | the model with the user's LoRA, trained on discovery examples, without the profile |
    | `"rag+stylevector"`, `"rag+steerx"`, `("rag+head_vector", scores)`, `"rag+lora"` | the same, with the profile |
    | `("dps+cad", scores)`, `("rag+head_vector+dps", scores)`, … | stacks |

    Args:
        model: a hooked model.
        users: of one task; their evaluation examples are answered.
        methods: name → method, in the order of the table; rules may be a `Term` of your own.
        metrics: by name, or a `Metric` of your own; those of the task by default. Settings are chosen by the first.
        strengths: the grid of γ and α, and of what a LoRA's change is multiplied by.
        ks: the grid of numbers of heads.
        max_examples: the newest so many evaluation examples of each user.
        max_new_tokens: by default what the task needs.
        prompt_config: how prompts are built; by default as for the scores.
        evaluate_config: rare settings: layers, examples that choose, exclusions.
        seed: of the folds that select heads.
        out: a run folder, where the evaluation is saved; a run that is started again there resumes.
        engine: as in `score_heads`; a shard answers for its users, with settings chosen on all of them.
        run_config: force, progress bars.

    Raises:
        EvaluationError: users of several tasks, an unknown method, nothing to choose on, a layer outside the model, or
            a reference that is not of the task's form.
        ScoreError: as `ablation_curve`.
        SteeringError: LoRA without peft, or on a `HookedTransformer`.
    """
    config, depth = evaluate_config or EvaluateConfig(), model.cfg.n_layers
    run = Run(model, Evaluation, out, engine, run_config)
    layers = (depth // 3, depth // 2, 2 * depth // 3) if config.layers is None else config.layers
    layers = tuple(dict.fromkeys(layers))
    asked = {name: find_method(name, one, strengths, ks, layers) for name, one in methods.items()}
    families = {name: method.family for name, method in asked.items() if method.family is not None}
    shared = inherited(
        "evaluate", families, positions="response", prompt_config=prompt_config, uses=("positions", "prompt_config")
    )
    bench = Bench(
        model,
        list(users),
        asked,
        find_metrics(metrics or ()),
        tuple(ks),
        config,
        max_examples,
        max_new_tokens,
        shared.prompt_config,
        seed,
    )
    return bench.run(run)
