"""Options that commands share."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Option("--model", "-m", help="smollm2-135m, a Hugging Face id, a folder or a .gguf file.")]
Users = Annotated[
    str, typer.Option("--users", "-u", help="'probe', a LaMP questions file, LongLaMP or document JSON lines.")
]
Outputs = Annotated[Path | None, typer.Option(help="LaMP outputs file, when it is not beside the questions.")]
MaxUsers = Annotated[int | None, typer.Option(min=1, help="Use the first so many users.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, …; by default the GPU when there is one.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
BatchSize = Annotated[int | None, typer.Option(min=1, help="Branches a batch; chosen by device when not given.")]


METHODS = ("plain", "rag", "cad", "dps", "dps:random", "stylevector")
"""What `evaluate` compares by default."""


class Discovery(str, Enum):
    history = "history"
    labelled = "labelled"


class Ablation(str, Enum):
    zero = "zero"
    mean = "mean"
    uniform = "uniform"


class Method(str, Enum):
    exact = "exact"
    screened = "screened"
    attribution = "attribution"


class Positions(str, Enum):
    response = "response"
    all = "all"
    profile = "profile"


class Contrast(str, Enum):
    no_profile = "no_profile"
    other_user = "other_user"
    none = "none"


class Select(str, Enum):
    others = "others"
    own = "own"


Run = Annotated[Path, typer.Option(help="Run folder of 'score'.")]
Kinds = Annotated[
    str,
    typer.Option(help="Families: induction, previous_token, duplicate_token, retrieval, function_vector."),
]
