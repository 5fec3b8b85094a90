"""From a request to a plan: whose profile, which rule, what is in the prompt."""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from dps_lens.data import Document, Prompt, PromptConfig
from dps_lens.data.prompts import conversation_prompt
from dps_lens.data.tasks import TASKS
from dps_lens.errors import DataError, PromptError, SteeringError
from dps_lens.heads import HeadSet
from dps_lens.model import HookedModel
from dps_lens.model.positions import rotary_switch
from dps_lens.serving.keys import Key
from dps_lens.serving.profiles import ProfileStore, SteeringProfile
from dps_lens.serving.schema import ChatRequest, CompletionRequest, Steer
from dps_lens.serving.steered import Steering
from dps_lens.steering import DecodeConfig, Sampling
from dps_lens.steering.continuous import Writing
from dps_lens.steering.plan import plan_of
from dps_lens.steering.rules import find_rule

_COMPLETION_TOKENS = 16  # as in OpenAI's API
_LETTERS = 32
"""Letters that a token may stand for, and few do."""


class UnknownUserError(DataError):
    """There is no profile of a user, or a key may not use it."""


class UnknownModelError(DataError):
    """A request names another model."""


class Resolver:
    """Makes plans of requests.

    Args:
        model: a hooked model.
        about: of `model_of`, read before the model runs.
        profiles: of users; None where the server keeps none.
        default: how answers are steered where a request says nothing.
        most_tokens: that a text may have.
        prompt_config: how much of a user's documents is shown.
    """

    def __init__(
        self,
        model: HookedModel,
        about: Mapping[str, Any],
        profiles: ProfileStore | None = None,
        *,
        default: Steering | None = None,
        most_tokens: int = 1024,
        prompt_config: PromptConfig | None = None,
    ) -> None:
        self.model, self.about, self.profiles, self.default = model, about, profiles, default or Steering()
        self.most_tokens, self.prompt_config = most_tokens, prompt_config or PromptConfig()
        self.default.check("the default", model)

    def steering(self, asked: Steer | None, key: Key | None) -> Steering:
        """How a request is steered: what it says, else the profile that it names, else the server's default.

        Raises:
            UnknownUserError: there is no such profile, or the key may not use it.
            SteeringError: what is asked for does not fit together, or the profile is of another model.
        """
        if asked is None:
            return self.default
        found = self.default if asked.user is None else self._profile(asked.user, key).steering()
        given: dict[str, Any] = {
            name: value
            for name in ("rule", "gamma", "alpha", "negative_prompt")
            if (value := getattr(asked, name)) is not None
        }
        # null lifts the cap of a profile.
        given |= {name: getattr(asked, name) for name in ("max_kl", "target_kl") if name in asked.model_fields_set}
        before = find_rule(found.rule)
        if asked.heads is not None:
            given["heads"] = HeadSet.parse(asked.heads)
            # Whoever names heads, and no rule, means the method.
            if asked.rule is None and not before.needs_heads:
                given["rule"] = "dps"
        if asked.vector is not None:
            if asked.rule is None and not before.needs_vectors:
                given["rule"] = "head_vector+dps" if asked.heads is not None else "head_vector"
            given["vector"] = self._profile(asked.vector, key).head_vector()
            if given["vector"] is None:
                raise SteeringError(f"the profile of user {asked.vector!r} has no vector")
        if asked.documents is not None:
            texts = [text for text in dict.fromkeys(asked.documents) if text.strip()]
            given["history"] = tuple(Document(str(index), {"text": text}) for index, text in enumerate(texts))
            given["task"] = "questions"
        if asked.target_kl is not None and asked.max_kl is None:
            given["max_kl"] = None
        steering = replace(found, **given)
        _check_read(asked, steering.rule)
        return steering

    def _profile(self, user: str, key: Key | None) -> SteeringProfile:
        if self.profiles is None:
            raise SteeringError("this server keeps no profiles; start it with --profiles FOLDER")
        allowed = key is None or key.may_use(user)
        # Whether a user exists is not for those who may not use the profile.
        profile = self.profiles.read(user) if allowed else None
        if profile is None:
            raise UnknownUserError(f"there is no profile of user {user!r:.200}")
        profile.check(self.model, self.about)
        return profile

    def chat(self, request: ChatRequest, steering: Steering) -> Writing:
        """What answers a chat; in the thread that runs the model.

        Raises:
            DPSLensError: the request cannot be answered.
        """
        messages = [
            {"role": "system" if one.role == "developer" else one.role, "content": one.text} for one in request.messages
        ]
        if messages[-1]["role"] == "assistant":
            raise PromptError("the last message is the assistant's; send what it is to answer")
        self._check_length(sum(len(one["content"]) for one in messages))
        own = self._conversation(messages, steering.history, steering.task)
        negative = None
        if find_rule(steering.rule).needs_negative:
            if not steering.history:
                raise SteeringError(
                    f"rule {steering.rule!r} contrasts with the prompt without the user's documents, and there are "
                    "none; give dps.documents, or a user whose profile has some"
                )
            negative = self._conversation(messages, (), steering.task)
        asked = request.max_completion_tokens or request.max_tokens
        likeliest = (request.top_logprobs or 0) if request.logprobs else 0
        return self._writing(request, steering, own, negative, asked or self._room(own), likeliest)

    def completion(self, request: CompletionRequest, prompt: str, steering: Steering) -> Writing:
        """What goes on from a text; in the thread that runs the model.

        Raises:
            DPSLensError: the request cannot be answered.
        """
        if find_rule(steering.rule).needs_negative and steering.negative_prompt is None:
            raise SteeringError(f"rule {steering.rule!r} of a completion needs dps.negative_prompt")
        self._check_length(len(prompt))
        self._check_length(len(steering.negative_prompt or ""))
        tokens = request.max_tokens or _COMPLETION_TOKENS
        return self._writing(request, steering, prompt, steering.negative_prompt, tokens, request.logprobs or 0)

    def _conversation(self, messages: Sequence[Mapping[str, str]], history: Sequence[Document], task: str) -> Prompt:
        return conversation_prompt(self.model, messages, history, task=TASKS[task], config=self.prompt_config)

    def _check_length(self, letters: int) -> None:
        """Refuse what cannot fit before it is made into tokens, while others wait."""
        most = _LETTERS * self.model.cfg.n_ctx
        if letters > most:
            raise PromptError(f"the prompt has {letters} characters; the model's context takes {most} at the very most")

    def _room(self, prompt: Prompt) -> int:
        """Tokens that an answer may have where nothing is asked for."""
        length, switch = len(prompt.prompt_tokens), rotary_switch(self.model)
        room = min(self.most_tokens, self.model.cfg.n_ctx - length)
        if switch is not None and length <= switch.limit:
            room = min(room, switch.limit - length + 1)
        return max(1, room)

    def _writing(
        self,
        request: ChatRequest | CompletionRequest,
        steering: Steering,
        prompt: Prompt | str,
        negative: Prompt | str | None,
        tokens: int,
        likeliest: int,
    ) -> Writing:
        if tokens > self.most_tokens:
            raise PromptError(f"max_tokens {tokens} is more than this server writes, {self.most_tokens}")
        rule, texts = find_rule(steering.rule), request.texts
        if rule.needs_heads and not len(steering.heads):
            raise SteeringError(f"rule {steering.rule!r} needs heads; give dps.heads, or a user whose profile has some")
        plan = plan_of(
            self.model,
            [prompt] * texts,
            rule=rule,
            heads=steering.heads if rule.needs_heads else None,
            vectors=steering.vector if rule.needs_vectors else None,
            gamma=steering.gamma,
            alpha=steering.alpha,
            negative_prompts=None if negative is None else [negative] * texts,
            max_new_tokens=tokens,
            sampling=_samplings(request),
            decode_config=DecodeConfig(max_kl=steering.max_kl, target_kl=steering.target_kl),
        )
        return Writing(plan, keep_likeliest=likeliest)


def _check_read(asked: Steer, name: str) -> None:
    """Refuse a setting that the rule would not look at.

    Raises:
        SteeringError: names it.
    """
    rule = find_rule(name)
    for field_name, read in (
        ("heads", rule.needs_heads),
        ("vector", rule.needs_vectors),
        ("gamma", rule.takes_gamma),
        ("alpha", rule.takes_alpha),
        ("max_kl", bool(rule.terms)),
        ("target_kl", bool(rule.terms)),
        ("negative_prompt", rule.needs_negative),
    ):
        if getattr(asked, field_name) is not None and not read:
            raise SteeringError(f"dps.{field_name} is given, and rule {name!r} does not look at it; leave it out")


def _samplings(request: ChatRequest | CompletionRequest) -> list[Sampling | None]:
    """How each text is sampled; text i of a seed is that of seed + i."""
    if request.temperature == 0:
        return [None] * request.texts
    seed = secrets.randbits(31) if request.seed is None else request.seed % 2**32
    temperature = 1.0 if request.temperature is None else request.temperature
    return [
        Sampling(temperature=temperature, top_p=request.top_p, top_k=request.top_k, seed=(seed + text) % 2**32)
        for text in range(request.texts)
    ]
