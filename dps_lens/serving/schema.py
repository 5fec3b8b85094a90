"""What requests hold: OpenAI's fields, and `dps`."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, model_validator

from dps_lens.serving.profiles import Strength, Strict, UserName

MOST_TEXTS = 8
_Text = Annotated[str, Field(max_length=1_000_000)]
_Stop = Annotated[str, Field(min_length=1, max_length=200)]
_Nothing = Annotated[list[Any], Field(max_length=0)] | None


class Steer(Strict):
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
        None, max_length=1000, description="Texts of the user in place of the profile's; [] shows none. Of chats."
    )
    negative_prompt: _Text | None = Field(
        None, description="What a completion is contrasted with by cad and dps-patch; chats leave the documents out."
    )
    report: bool = Field(False, description="Return KL and token shifts of every step.")


class StreamOptions(Strict):
    include_usage: bool = False


class _Request(Strict):
    model: str = Field(max_length=200)
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=100, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(None, ge=1)
    n: int | None = Field(None, ge=1, le=MOST_TEXTS)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: _Stop | Annotated[list[_Stop], Field(max_length=4)] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    dps: Steer | None = None
    # What other servers take and this one does not do: refused where it asks for something.
    user: str | None = Field(None, max_length=500, description="Ignored; a profile is named in dps.user.")
    metadata: dict[str, Any] | None = Field(None, description="Ignored.")
    store: Literal[False] | None = None
    presence_penalty: Literal[0] | None = None
    frequency_penalty: Literal[0] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    service_tier: Literal["auto", "default"] | None = None

    @model_validator(mode="after")
    def _streams(self) -> "_Request":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options goes with stream")
        return self

    @property
    def texts(self) -> int:
        """How many texts are written for a prompt."""
        return self.n or 1

    @property
    def stops(self) -> list[str]:
        """Texts that end an answer, and are not in it."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])


class TextPart(Strict):
    type: Literal["text"]
    text: _Text


class PlainText(Strict):
    type: Literal["text"]


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: _Text | list[TextPart]
    # What an answer of OpenAI's holds that is sent back as it is.
    name: None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    tool_calls: _Nothing = None
    annotations: _Nothing = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(_Request):
    """`POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1, max_length=1000)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: _Nothing = None
    tool_choice: Literal["none"] | None = None
    parallel_tool_calls: bool | None = None
    response_format: PlainText | None = None

    @model_validator(mode="after")
    def _reads_all(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs goes with logprobs")
        if self.dps is not None and self.dps.negative_prompt is not None:
            raise ValueError("dps.negative_prompt is of completions; chats are contrasted with no documents")
        return self


class CompletionRequest(_Request):
    """`POST /v1/completions`."""

    prompt: _Text | Annotated[list[_Text], Field(min_length=1, max_length=16)]
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: Literal[False] | None = None
    suffix: Annotated[str, Field(max_length=0)] | None = None
    best_of: Literal[1] | None = None

    @model_validator(mode="after")
    def _reads_all(self) -> "CompletionRequest":
        if self.dps is not None and self.dps.documents is not None:
            raise ValueError("dps.documents is of chats; write into the prompt what it is to hold")
        return self

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
