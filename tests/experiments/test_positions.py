"""Dialogues: what is edited, and the losses of every turn, against plain passes."""

import torch

import dps_lens as dps
from dps_lens.heads import HeadSet
from experiments.lib.dialogue import dialogue, turn_losses

CONFIG = dps.PromptConfig(items=2, profile_tokens=60, task_tokens=20, response_tokens=6)


def test_turns_hold_the_answers_and_the_profile_comes_once(llama, probe):
    model, examples = llama.hooked, probe[0].examples
    for shown in (True, False):
        talk = dialogue(model, examples, shown, CONFIG)
        told = [model.tokenizer.decode(talk.prompt.tokens[start:stop]).strip() for start, stop in talk.turns]
        for answer, example in zip(told, examples, strict=True):
            assert example.reference.startswith(answer.split("\n")[0][:8])
        assert talk.prompt.text.count("Earlier texts by this user") == int(shown)


def test_losses_of_every_turn_equal_one_plain_pass(llama, probe):
    talk = dialogue(llama.hooked, probe[0].examples, True, CONFIG)
    heads = HeadSet.parse("L0H1,L2H3")
    masks = torch.stack([HeadSet().mask(llama.hooked.cfg), heads.mask(llama.hooked.cfg)])
    found = turn_losses(llama.hooked, talk, masks)
    tokens = talk.prompt.tokens
    edited = torch.zeros(len(tokens), dtype=torch.bool)
    for start, stop in talk.turns:
        edited[start - 1 : stop] = True

    def cut(z, hook):
        layer = int(hook.name.split(".")[1])
        for head in heads:
            if head.layer == layer:
                z[:, edited[: z.shape[1]], head.head] = 0
        return z

    names = [f"blocks.{layer}.attn.hook_z" for layer in (0, 2)]
    for row, hooks in enumerate(([], [(name, cut) for name in names])):
        with torch.no_grad():
            logits = llama.hooked.run_with_hooks(tokens[None], fwd_hooks=hooks)[0]
        losses = -logits[:-1].log_softmax(-1).gather(-1, tokens[1:, None])[:, 0]
        for turn, (start, stop) in enumerate(talk.turns):
            assert torch.allclose(losses[start - 1 : stop - 1].mean().double(), found[turn, row], atol=1e-4)
