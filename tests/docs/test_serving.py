"""The lines of docs/serving.md run as written against the command that it names."""

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import dps_lens as dps
from dps_lens.cli import app
from dps_lens.data import Document
from dps_lens.data.prompts import conversation_prompt
from dps_lens.heads import HeadSet
from dps_lens.serving import ProfileStore, SteeringProfile, model_of
from dps_lens.serving.profiles import ProfileDocument

TEXT = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
HEADS = "L14H3,L14H1,L20H6"
DOCUMENTS = ["Who says that bread needs kneading?", "Why is the oven never hot enough?"]


@pytest.fixture(scope="module")
def served(real, tmp_path_factory):
    """`dps-lens serve` with the profile that the page asks with, and what it has written when it has stopped."""
    folder = tmp_path_factory.mktemp("profiles")
    documents = [ProfileDocument(id=str(at), fields={"text": text}) for at, text in enumerate(DOCUMENTS)]
    profile = SteeringProfile(user="asker-bread", model=model_of(real), heads=HEADS, max_kl=0.5, documents=documents)
    ProfileStore(folder).write(profile)
    command = [sys.executable, "-m", "dps_lens", "serve", "--profiles", folder, "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        said = ""
        while "serving" not in said:
            line = process.stderr.readline()
            assert line, said
            said += line
        yield re.search(r"http://(127\.0\.0\.1:\d+)/v1", said)[1]
    finally:
        process.send_signal(signal.SIGTERM)
        _, rest = process.communicate(timeout=60)
    assert process.returncode in (0, -signal.SIGTERM), rest
    lines = [json.loads(line) for line in rest.splitlines() if line.startswith("{")]
    assert [line["status"] for line in lines] == [200] * len(lines)
    assert "bakery" not in rest


def prompt_of(model):
    history = [Document(str(at), {"text": text}) for at, text in enumerate(DOCUMENTS)]
    return conversation_prompt(model, [{"role": "user", "content": "Write a headline about a bakery."}], history)


@pytest.mark.real
def test_curl_lines(served, real):
    if shutil.which("curl") is None:
        pytest.skip("no curl on this machine")
    chat, stream = (
        subprocess.run(
            ["bash", "-c", line.replace("127.0.0.1:8000", served)], capture_output=True, text=True, check=True
        ).stdout
        for line in re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)
    )
    own = dps.generate(
        real,
        prompt_of(real),
        heads=HeadSet.parse(HEADS),
        max_new_tokens=24,
        decode_config=dps.DecodeConfig(max_kl=0.5),
    )
    assert json.loads(chat)["choices"][0]["message"]["content"] == own.texts[0]
    pieces = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: {")]
    own = dps.generate(
        real,
        "The night train",
        heads=HeadSet.parse("L14H3,L14H1"),
        gamma=1.5,
        max_new_tokens=16,
        sampling=dps.Sampling(seed=7),
    )
    assert "".join(one["choices"][0]["text"] for one in pieces) == own.texts[0]
    assert stream.rstrip().endswith("data: [DONE]")


@pytest.mark.real
def test_openais_client(served, real, capsys):
    code = re.search(r"```python\n(from openai.*?)```", TEXT, re.DOTALL)[1]
    exec(compile(code.replace("127.0.0.1:8000", served), "serving.md", "exec"), {})
    own = dps.generate(
        real,
        prompt_of(real),
        heads=HeadSet.parse(HEADS),
        gamma=2.0,
        max_new_tokens=24,
        decode_config=dps.DecodeConfig(max_kl=0.5),
    )
    assert capsys.readouterr().out.startswith(own.texts[0])


def test_commands_and_options_exist():
    import typer

    for line in re.findall(r"^(?:CUDA\S+ )?dps-lens (.*)$", TEXT, re.MULTILINE):
        command, words = typer.main.get_command(app), line.split()
        while hasattr(command, "commands"):
            command = command.commands[words.pop(0)]
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known
    serve = typer.main.get_command(app).commands["serve"]
    known = {option for parameter in serve.params for option in parameter.opts}
    assert set(re.findall(r"`(--[\w-]+)`", TEXT)) - known <= {"--own", "--users"}
