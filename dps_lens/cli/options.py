"""Options that commands share."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from dps_lens.literals import ProfileIn, ScoreAgainst, Select

Model = Annotated[str, typer.Option("--model", "-m", help="smollm2-135m, a Hugging Face id, a folder or a .gguf file.")]
Users = Annotated[
    str, typer.Option("--users", "-u", help="'probe', LaMP questions, LongLaMP records, documents, pairs or choices.")
]
Outputs = Annotated[Path | None, typer.Option(help="LaMP outputs file, when it is not beside the questions.")]
MaxUsers = Annotated[int | None, typer.Option(min=1, help="Use the first so many users.")]
Only = Annotated[
    list[str] | None,
    typer.Option(
        "--only",
        help="Use this user's evaluation examples only; others' profiles stay there to compare with. May be repeated.",
    ),
]
HeldOutExamples = Annotated[
    int | None, typer.Option("--max-examples", min=1, help="Newest evaluation examples of each user; all by default.")
]
Strict = Annotated[
    bool, typer.Option("--strict", help="Refuse a user with too short a history instead of leaving the user out.")
]
TemplateKwargs = Annotated[
    str | None,
    typer.Option("--chat-template-kwargs", help="JSON for the chat template, such as '{\"enable_thinking\": false}'."),
]
ProfilePlace = Annotated[
    ProfileIn,
    typer.Option("--profile-in", help="Where a prompt shows the profile: before the task, or in a turn of its own."),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, …; by default the GPU when there is one.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
BatchSize = Annotated[int | None, typer.Option(min=1, help="Rows a batch; chosen by device when not given.")]
Force = Annotated[bool, typer.Option(help="Drop what the run folder holds.")]
OwnHeads = Annotated[Select, typer.Option(help="Heads by other users, or by each user's own examples.")]
Against = Annotated[
    Literal[ScoreAgainst, "none"],
    typer.Option(help="What the own profile is compared with; 'none' for the paper's PCS."),
]
Ablation = Annotated[
    str, typer.Option(help="zero, mean, patch, uniform, or one of your own: file.py:Name or package.module:Name.")
]
Pairs = Annotated[
    str | None,
    typer.Option(help="Give every text another user's as its rejected answer: 'any', or of those who share a label."),
]
Objective = Annotated[
    str | None,
    typer.Option(help="What is measured: nll, pair, choice, or one of your own, file.py:Name; as scored, else nll."),
]
Run = Annotated[Path, typer.Option(help="Run folder of 'score'.")]
HeadsRun = Annotated[Path, typer.Option("--run", help="Run folder of 'score' or 'find'.")]
Kinds = Annotated[
    str,
    typer.Option(
        help="Families: induction, previous_token, duplicate_token, copying, copy_suppression, retrieval, "
        "function_vector, or file.py:Name."
    ),
]

METHODS = ("plain", "rag", "cad", "dps", "dps:random", "stylevector")
"""What `evaluate` compares by default."""
