"""`generate` with all its settings as keywords, for tests that put them together from several sources."""

from dataclasses import fields, replace

import dps_lens as dps

DECODE = {one.name for one in fields(dps.DecodeConfig)}
SAMPLING = {one.name for one in fields(dps.Sampling)}


def generate(model, prompts, **options):
    """Settings of `DecodeConfig` by name; with `do_sample`, those of `Sampling`, the seed also one a prompt."""
    decode = {name: options.pop(name) for name in DECODE & {*options}}
    sampling = {name: options.pop(name) for name in SAMPLING & {*options}}
    options["decode_config"] = replace(options.get("decode_config") or dps.DecodeConfig(), **decode)
    if options.pop("do_sample", False):
        rows = len(prompts) if isinstance(prompts, (list, tuple)) else 1
        seeds = sampling.pop("seed", 0)
        seeds = seeds if isinstance(seeds, list) else [seeds] * rows
        options["sampling"] = [dps.Sampling(seed=seed, **sampling) for seed in seeds]
    return dps.generate(model, prompts, **options)
