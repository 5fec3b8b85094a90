"""Slow, independent versions: a plain Hugging Face model, no hooks, no cache, one forward a head."""

from contextlib import contextmanager

import torch
from torch.nn.functional import cross_entropy

ATTENTION = ("self_attn", "attn", "attention", "self_attention")


def attention_modules(plain):
    """The attention module of every layer of a plain Hugging Face model."""
    for name in ("layers", "h", "blocks"):
        for module in plain.modules():
            if isinstance(getattr(module, name, None), torch.nn.ModuleList):
                return [next(getattr(b, n) for n in ATTENTION if hasattr(b, n)) for b in getattr(module, name)]
    raise AssertionError("no layers")


def output_projection(attention):
    return next(
        getattr(attention, name) for name in ("o_proj", "c_proj", "dense", "out_proj") if hasattr(attention, name)
    )


@contextmanager
def columns_replaced(plain, layer, head, d_head, positions, new):
    """The input columns of one head in the output projection, replaced at some positions."""
    columns = slice(head * d_head, (head + 1) * d_head)

    def edit(module, arguments):
        z = arguments[0].clone()
        z[:, positions, columns] = new if not callable(new) else new(z)[:, positions]
        return (z, *arguments[1:])

    handle = output_projection(attention_modules(plain)[layer]).register_forward_pre_hook(edit)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def nll(plain, prompt):
    """Mean cross entropy of the response in float64."""
    start, stop = prompt.spans["response"]
    logits = plain(input_ids=prompt.tokens[None]).logits[0, start - 1 : stop - 1].double()
    return float(cross_entropy(logits, prompt.tokens[start:stop]))


@torch.no_grad()
def z_of(plain, prompt, layer):
    """`[pos head*d_head]` entering the output projection of a layer."""
    found = []
    module = output_projection(attention_modules(plain)[layer])
    handle = module.register_forward_pre_hook(lambda _, arguments: found.append(arguments[0][0].clone()))
    plain(input_ids=prompt.tokens[None])
    handle.remove()
    return found[0]


def edited_positions(prompt, positions):
    start, stop = prompt.spans["response"]
    return {
        "response": slice(start - 1, stop),
        "all": slice(0, stop),
        "profile": slice(*prompt.spans["profile"]),
    }[positions]


def ablated_nll(plain, prompt, layer, head, d_head, positions, new):
    with columns_replaced(plain, layer, head, d_head, edited_positions(prompt, positions), new):
        return nll(plain, prompt)


def uniform_z(plain, layer, head, d_head, n_heads):
    """What z becomes when head `head` spreads its attention evenly over what it sees, as a function of
    the live forward pass: the mean of v, computed from the projection's own output."""
    attention = attention_modules(plain)[layer]
    values = []

    def keep(module, arguments, output):
        values.append(output)

    if hasattr(attention, "v_proj"):
        handle = attention.v_proj.register_forward_hook(keep)
    else:
        handle = next(
            getattr(attention, n) for n in ("c_attn", "query_key_value") if hasattr(attention, n)
        ).register_forward_hook(keep)

    def new(z):
        v = values[-1][0]
        if hasattr(attention, "v_proj"):
            kv_heads = v.shape[-1] // d_head
            kv = head // (n_heads // kv_heads)
            v = v[:, kv * d_head : (kv + 1) * d_head]
        elif hasattr(attention, "c_attn"):
            v = v[:, 2 * n_heads * d_head :][:, head * d_head : (head + 1) * d_head]
        else:
            v = v.view(len(v), n_heads, 3, d_head)[:, head, 2]
        window = len(v)
        kind = getattr(plain.config, "layer_types", None)
        if kind and kind[layer] == "sliding_attention":
            window = plain.config.sliding_window
        return torch.stack([v[max(0, query - window + 1) : query + 1].mean(0) for query in range(len(v))])[None]

    return new, handle


@torch.no_grad()
def two_pass_greedy(plain_logits, masked_logits, tokens, gamma, steps, ends):
    """Naive DPS: no cache, two whole passes a step. Returns tokens and the smallest top-2 gap met."""
    new, gap = [], float("inf")
    for _ in range(steps):
        full = plain_logits(tokens)
        logits = (1 + gamma) * full - gamma * masked_logits(tokens) if gamma else full
        best = logits.topk(2).values
        gap = min(gap, float(best[0] - best[1]))
        token = logits.argmax()
        new.append(int(token))
        tokens = torch.cat([tokens, token[None]])
        if int(token) in ends:
            break
    return new, gap
