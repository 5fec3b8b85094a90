"""Direct paths by hand: a plain Hugging Face model with hooks on its modules."""

from contextlib import ExitStack, contextmanager

import torch
from oracles import columns_replaced, nll, z_of

import dps_lens as dps
from dps_lens.heads import Head
from dps_lens.model import runner_of
from dps_lens.paths.direct import DirectPaths
from dps_lens.scoring import CleanRun

PROMPT = dps.PromptConfig(items=2, profile_tokens=40, task_tokens=16, response_tokens=6)
SENDERS = [Head(0, 1), Head(1, 3), Head(0, 2)]


class Case:
    """A model, an own and a counterfactual prompt of one response, and the clean run of the first."""

    def __init__(self, tiny, users):
        self.tiny, self.cfg = tiny, tiny.hooked.cfg
        self.own = dps.build_prompt(tiny.hooked, users[0].examples[-1], config=PROMPT)
        self.other = dps.build_prompt(tiny.hooked, users[0].examples[-1], users[1], config=PROMPT)
        runner = runner_of(tiny.hooked)
        self.run = CleanRun(runner, self.own, keep_z=True)
        self.z = CleanRun(runner, self.other, keep_z=True).z
        self.paths = DirectPaths(self.run)
        start, stop = self.own.spans["response"]
        self.positions = slice(start - 1, stop - 1)

    def other_z(self, head):
        """Of the counterfactual run, by the plain model, `[pos d_head]`."""
        start, stop = self.other.spans["response"]
        columns = slice(head.head * self.cfg.d_head, (head.head + 1) * self.cfg.d_head)
        return z_of(self.tiny.plain, self.other, head.layer)[start - 1 : stop - 1, columns]

    def z_with(self, head, hooks):
        """z of a head in the own prompt under forward hooks, `[pos d_head]`."""
        columns = slice(head.head * self.cfg.d_head, (head.head + 1) * self.cfg.d_head)
        with hooked(hooks):
            return z_of(self.tiny.plain, self.own, head.layer)[self.positions, columns]

    def nll_with(self, head, z):
        with columns_replaced(self.tiny.plain, head.layer, head.head, self.cfg.d_head, self.positions, z):
            return nll(self.tiny.plain, self.own)


@contextmanager
def hooked(hooks):
    with ExitStack() as stack:
        for register, hook in hooks:
            stack.callback(register(hook).remove)
        yield


def blocks_of(plain):
    for name in ("layers", "h", "blocks"):
        for module in plain.modules():
            if isinstance(getattr(module, name, None), torch.nn.ModuleList):
                return getattr(module, name)


def written_by_hand(case, head):
    """The block's output without its MLP, z patched, minus the same unpatched: by the plain model."""
    plain, block = case.tiny.plain, blocks_of(case.tiny.plain)[head.layer]
    mlp, outputs, other = block.mlp, [], case.other_z(head)

    def leaves(module, arguments, output):
        outputs.append((output[0] if isinstance(output, tuple) else output)[0, case.positions].clone())

    held = []

    def hold(module, arguments, output):
        held.append(output.clone())
        return held[0]

    with torch.no_grad(), hooked([(block.register_forward_hook, leaves), (mlp.register_forward_hook, hold)]):
        plain(input_ids=case.own.tokens[None])
        with columns_replaced(plain, head.layer, head.head, case.cfg.d_head, case.positions, other):
            plain(input_ids=case.own.tokens[None])
    return outputs[1] - outputs[0]


def add_write(case, block, write):
    """A hook that adds to what enters a block at the response positions."""
    added = torch.zeros(1, len(case.own.tokens), case.cfg.d_model)
    added[0, case.positions] = write

    def add(module, arguments, kwargs):
        if arguments:
            return (arguments[0] + added, *arguments[1:]), kwargs
        return arguments, {**kwargs, "hidden_states": kwargs["hidden_states"] + added}

    return (lambda hook: block.register_forward_pre_hook(hook, with_kwargs=True), add)
