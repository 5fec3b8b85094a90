"""What requests hold: OpenAI's fields, and `dps`."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from dps_lens.serving.profiles import Strength, UserName

MOST_TEXTS = 8
_Text = Annotated[str, Field(max_length=1_000_000)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Steer(_Strict):
    """How an answer is steered; what is left out is the user's profile's, else the server's default."""

    user: UserName | None = Field(None, description="Whose profile: heads, vector, rule, strengths and documents.")
    heads: str | None = Field(None, max_length=20_000, description="Heads by name, such as L12H3,L4H0.")
    rule: str | None = Field(None, max_length=60, description="A rule of dps_lens.generate; 'greedy' steers nothing.")
    gamma: Strength | None = Field(None, description="Its strength; 0 is the plain model.")
    alpha: Strength | None = Field(None, description="Strength of the second contrast, or of prompts.")
    max_kl: Strength | None = Field(None, description="Cap on KL(steered || full) at every step, nats.")
    target_kl: Strength | None = Field(None, description="Make it so many nats at every step.")
    vector: UserName | None = Field(None, description="The user whose profile's vector is added.")
    documents: list[_Text] | None = Field(
        None, max_length=1000, description="Texts of the user in place of the profile's; [] shows none."
    )
    negative_prompt: _Text | None = Field(
        None, description="What a completion is contrasted with by cad and dps-patch; chats leave the documents out."
    )
    report: bool = Field(False, description="Return KL and token shifts of every step.")


class StreamOptions(_Strict):
    include_usage: bool = False


class _Request(_Strict):
    model: str = Field(max_length=200)
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=100, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(None, ge=1)
    n: int | None = Field(None, ge=1, le=MOST_TEXTS)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: (
        Annotated[str, Field(min_length=1, max_length=200)]
        | list[Annotated[str, Field(min_length=1, max_length=200)]]
        | None
    ) = Field(None, max_length=200)
    seed: int | None = Field(None, ge=0, lt=2**32)
    dps: Steer | None = None
    # What other servers take and this one does not do: refused where it asks for something.
    user: str | None = Field(None, max_length=500, description="Ignored; a profile is named in dps.user.")
    metadata: dict[str, Any] | None = Field(None, description="Ignored.")
    store: Literal[False] | None = None
    presence_penalty: Literal[0] | None = None
    frequency_penalty: Literal[0] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None

    @property
    def texts(self) -> int:
        """How many texts are written for a prompt."""
        return self.n or 1

    @property
    def stops(self) -> list[str]:
        """Texts that end an answer, and are not in it."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])


class TextPart(_Strict):
    type: Literal["text"]
    text: _Text


class Message(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: _Text | list[TextPart]
    name: str | None = Field(None, max_length=200)

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(_Request):
    """`POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1, max_length=1000)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none"] | None = None
    parallel_tool_calls: bool | None = None


class CompletionRequest(_Request):
    """`POST /v1/completions`."""

    prompt: _Text | Annotated[list[_Text], Field(min_length=1, max_length=16)]
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: Literal[False] | None = None
    suffix: Annotated[str, Field(max_length=0)] | None = None
    best_of: Literal[1] | None = None

    @property
    def prompts(self) -> list[str]:
        """The texts to go on from."""
        return [self.prompt] if isinstance(self.prompt, str) else list(self.prompt)


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorAnswer(BaseModel):
    """An error in OpenAI's form."""

    error: ErrorBody
