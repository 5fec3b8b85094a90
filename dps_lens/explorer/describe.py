"""What a head does in a shown example, for the detail view of a live page."""

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from dps_lens.data import PromptConfig, User
from dps_lens.dossier import describe_head
from dps_lens.errors import DPSLensError
from dps_lens.explorer.code import Origin, as_command, as_python, config_as_python, run_folder
from dps_lens.explorer.question import Refused
from dps_lens.heads import Head, HeadSet
from dps_lens.model import HookedModel
from dps_lens.plots import dossier
from dps_lens.work import RunConfig


class Describer:
    """Makes dossiers of heads in the newest evaluation example of a user of the page.

    Args:
        model: a hooked model.
        users: of the page; those who do not ask lend profiles.
        config: how its prompts are built.
        origin: of the model and the users, for the lines that are offered with an answer.
    """

    def __init__(
        self, model: HookedModel, users: Sequence[User], config: PromptConfig, origin: Origin | None = None
    ) -> None:
        self.model, self.users, self.config, self.origin = model, tuple(users), config, origin or Origin()

    def read(self, request: object) -> tuple[Head, User]:
        """Head and user of a request.

        Raises:
            Refused: names the field that is missing or wrong.
        """
        given: Mapping[str, Any] = request if isinstance(request, dict) else {}
        user = next((one for one in self.users if one.id == given.get("user") and one.examples), None)
        if user is None:
            raise Refused("user", f"{given.get('user')!r:.80} has no example on this page")
        try:
            head = Head.parse(str(given.get("head")))
            HeadSet([head]).mask(self.model.cfg)
        except DPSLensError as error:
            raise Refused("head", str(error)) from error
        return head, user

    def describe(self, head: Head, user: User) -> Iterator[dict[str, Any]]:
        """One line, `{"figure": …}` with the code that makes it."""
        against = "other_user" if len(self.users) > 1 else "no_profile"
        asked = [replace(one, examples=one.examples if one.id == user.id else ()) for one in self.users]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the other users have no examples
            found = describe_head(
                self.model,
                asked,
                head,
                against=against,  # type: ignore[arg-type]  # one of its literals
                prompt_config=self.config,
                run_config=RunConfig(progress=False),
            )
        code = f"asked = [replace(one, examples=one.examples if one.id == {user.id!r} else ()) for one in users]"
        call = (
            f"found = dps.describe_head(\n    model, asked, {str(head)!r}, against={against!r}, "
            f"prompt_config={config_as_python(self.config)}\n)\nprint(found.to_frame())"
        )
        options = (head, "--against", against, "--out", run_folder(str(head), user.id))
        yield {
            "figure": json.loads(dossier(found).to_json()),
            "python": as_python(self.origin, code, call),
            "command": as_command(self.origin, "describe", user, options, self.config),
        }
