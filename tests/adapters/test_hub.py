"""`generate` of transformers alone writes what `dps.generate` writes, from one file."""

import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ARCHITECTURES

import dps_lens as dps
from dps_lens.errors import HeadError, SteeringError
from dps_lens.heads import HeadSet

HEADS = HeadSet.parse("L1H2,L0H1,L2H3")
TRUSTED = {"trust_remote_code": True, "do_sample": False, "max_new_tokens": 14, "pad_token_id": 0, "eos_token_id": 599}


@pytest.fixture
def prompts(probe, short):
    return [user.examples[0] for user in probe[:2]]


def bare(model, prompt, **options):
    written = dps.generate(
        model, prompt, max_new_tokens=14, decode_config=dps.DecodeConfig(stop_at_eos=False), **options
    ).tokens[0]
    ends = (written == TRUSTED["eos_token_id"]).nonzero().flatten().tolist()
    return written[: ends[0] + 1] if ends else written


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_writes_what_dps_generate_writes(tinies, prompts, short, tmp_path, architecture):
    tiny = tinies(architecture)
    prompt = dps.build_prompt(tiny.hooked, prompts[0], config=short, response=False)
    ids = prompt.prompt_tokens[None]
    dps.export_generate(tiny.hooked, HEADS, tmp_path, gamma=1.7)
    for gamma in (None, -1.0, 0.4):
        given = {} if gamma is None else {"gamma": gamma}
        mask = torch.ones_like(ids)
        out = tiny.plain.generate(ids, attention_mask=mask, custom_generate=str(tmp_path), **TRUSTED, **given)
        own = bare(tiny.hooked, prompt, heads=HEADS, gamma=1.7 if gamma is None else gamma)
        assert out[0, ids.shape[1] :].tolist() == own.tolist()
    assert "forward" not in vars(tiny.plain)


def test_strength_zero_is_the_models_own_text(llama, prompts, short, tmp_path):
    ids = dps.build_prompt(llama.hooked, prompts[0], config=short, response=False).prompt_tokens[None]
    dps.export_generate(llama.hooked, HEADS, tmp_path)
    options = {name: value for name, value in TRUSTED.items() if name != "trust_remote_code"}
    plain = llama.plain.generate(ids, **options)
    assert llama.plain.generate(ids, custom_generate=str(tmp_path), gamma=0, **TRUSTED).tolist() == plain.tolist()


def test_padded_prompts_and_processors(llama, prompts, short, tmp_path):
    """Rows of a batch, the first of them padded; what is ruled out stays so."""
    built = [dps.build_prompt(llama.hooked, one, config=short, response=False) for one in prompts]
    longest = max(len(one.prompt_tokens) for one in built)
    rows = [torch.nn.functional.pad(one.prompt_tokens, (longest - len(one.prompt_tokens), 0)) for one in built]
    mask = torch.stack([(torch.arange(longest) >= longest - len(one.prompt_tokens)).long() for one in built])
    dps.export_generate(llama.hooked, HEADS, tmp_path)
    options = {"custom_generate": str(tmp_path), "attention_mask": mask, **TRUSTED}
    out = llama.plain.generate(torch.stack(rows), **options)
    for row, one in enumerate(built):
        assert out[row, longest:].tolist() == bare(llama.hooked, one, heads=HEADS).tolist()
    banned = int(out[0, longest])
    again = llama.plain.generate(torch.stack(rows), suppress_tokens=[banned], **options)
    assert banned not in again[:, longest:]


def test_it_needs_no_package_of_ours(llama, tiny_folders, prompts, short, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_folders["llama"], folder)
    dps.export_generate(llama.hooked, HEADS, folder)
    prompt = dps.build_prompt(llama.hooked, prompts[0], config=short, response=False)
    code = (
        "import sys, torch, transformers\n"
        f"model = transformers.AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code=True)\n"
        f"ids = torch.tensor([{prompt.prompt_tokens.tolist()}])\n"
        "out = model.generate(inputs=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=14,\n"
        "                     pad_token_id=0, eos_token_id=599)\n"
        "assert not any(name.startswith('dps_lens') for name in sys.modules)\n"
        "print(out[0, ids.shape[1]:].tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == str(bare(llama.hooked, prompt, heads=HEADS).tolist())


def test_what_cannot_be_is_refused(llama, tmp_path):
    ids = torch.tensor([[5, 6, 7, 8]])
    dps.export_generate(llama.hooked, HEADS, tmp_path)
    for options, words in (
        ({"num_beams": 2}, "num_beams"),
        ({"gamma": -2}, "gamma"),
        ({"gamma": float("nan")}, "gamma"),
        ({"use_cache": False}, "use_cache"),
        ({"assistant_model": llama.plain}, "assistant_model"),
    ):
        with pytest.raises(ValueError, match=words):
            llama.plain.generate(ids, custom_generate=str(tmp_path), **{**TRUSTED, **options})
        assert "forward" not in vars(llama.plain)
    with pytest.raises(SteeringError, match="empty"):
        dps.export_generate(llama.hooked, HeadSet(), tmp_path)
    with pytest.raises(HeadError):
        dps.export_generate(llama.hooked, HeadSet.parse("L9H0"), tmp_path)
    other = tmp_path / "other" / "custom_generate"
    other.mkdir(parents=True)
    (other / "generate.py").write_text("def generate(): ...")
    with pytest.raises(SteeringError, match="another origin"):
        dps.export_generate(llama.hooked, HEADS, tmp_path / "other")
