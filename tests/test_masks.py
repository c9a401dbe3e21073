"""The loss mask is 1 on what the target wrote and nowhere else, whatever is asked and however it is rendered.

What the target wrote is found out anew: transformers renders the conversation and runs the model over all of it. With
greedy decoding a token is the target's own if it is the likeliest one after those before it.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import polars as pl
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from batchgen import export, features, job, spec, store

if TYPE_CHECKING:
    from pathlib import Path

    from batchgen.record import Message

TEMPLATES = {
    "chatml": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "with a system message of its own": "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n"
    "{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "instructions": "{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }}<|im_end|>{% else %}"
    "[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}",
}
# What an answer could be taken for, and what one could be taken to begin with.
MAX_TOKENS = 12
WORDS = ["fox", "the lazy dog", "assistant\n", "[/INST]", "<|im_end|>", "<|im_start|>assistant\n", "é", "\n\n", "2 + 2"]


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small random Llama for each template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    signs = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=signs, show_progress=False)
    tokenizer.train_from_iterator(["the quick brown fox", "jumps over the lazy dog"] * 20, trainer)
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in ("<|im_start|>", "<|im_end|>")])
    found = {}
    for name, template in TEMPLATES.items():
        folder = found[name] = tmp_path_factory.mktemp("target")
        torch.manual_seed(len(name))
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 1}
        end = tokenizer.token_to_id("<|im_end|>")
        config = LlamaConfig(**sizes, vocab_size=tokenizer.get_vocab_size(), eos_token_id=end, bos_token_id=None)
        # Large weights: a random model of small ones repeats one token.
        model = LlamaForCausalLM(config)
        with torch.no_grad():
            for weights in model.parameters():
                weights.mul_(4 if weights.dim() > 1 else 1)
        model.save_pretrained(folder)
        tokenizer.save(str(folder / "tokenizer.json"))
        facts = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "chat_template": template}
        (folder / "tokenizer_config.json").write_text(json.dumps(facts))
    return found


TEXTS = st.lists(st.sampled_from(WORDS), min_size=1, max_size=4).map(" ".join).filter(str.strip)


def conversations() -> st.SearchStrategy[list[list[Message]]]:
    turns = st.lists(TEXTS, min_size=1, max_size=5).filter(lambda texts: len(texts) % 2)
    system = st.none() | TEXTS

    def messages(parts: tuple[str | None, list[str]]) -> list[Message]:
        said: list[Message] = [
            {"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(parts[1])
        ]
        return said if parts[0] is None else [{"role": "system", "content": parts[0]}, *said]

    return st.lists(st.tuples(system, turns).map(messages), min_size=1, max_size=4)


def exported(target: Path, folder: Path, column: str, asked: list[Any]) -> list[dict[str, Any]]:
    """The rows of an export by token ids of a job that answers `asked`, in that order."""
    ids = [f"row-{i}" for i in range(len(asked))]
    pl.DataFrame({"id": ids, column: asked}).write_parquet(folder / "in.parquet")
    sections: dict[str, Any] = {
        "input": {"path": str(folder / "in.parquet"), column: column, "id": "id"},
        "model": {"target": str(target), "dtype": "float32"},
        "sampling": {"max_tokens": MAX_TOKENS},
        "output": {"path": str(folder / "out")},
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(sections))
    loaded = spec.load(str(folder / "job.yaml"))
    job.submit(loaded)
    export.run(loaded, "speculators", str(folder / "data"), export.Selection())
    lines = [line for file in (folder / "data").glob("*.jsonl") for line in file.read_text().splitlines()]
    rows = {row["primary_id"]: row for row in map(json.loads, lines)}
    assert sorted(rows) == ids
    return [rows[name] for name in ids]


def stretches(mask: list[int]) -> list[tuple[int, int]]:
    """Where the mask is 1."""
    edges = [i for i, (a, b) in enumerate(zip([0, *mask], [*mask, 0], strict=True)) if a != b]
    return list(zip(edges[::2], edges[1::2], strict=True))


def check_answer(model: Any, tokens: list[int], start: int, stop: int, end: int) -> None:
    """These tokens are what `model` itself says there, ended by itself or by the limit."""
    with torch.no_grad():
        likeliest = model(torch.tensor([tokens])).logits[0].argmax(-1).tolist()
    assert tokens[start:stop] == likeliest[start - 1 : stop - 1]
    assert end not in tokens[start : stop - 1]
    assert tokens[stop - 1] == end or stop - start == MAX_TOKENS


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(template=st.sampled_from(sorted(TEMPLATES)), asked=conversations())
def test_the_mask_is_on_the_targets_own_tokens(
    targets: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, template: str, asked: list[list[Message]]
) -> None:
    target = targets[template]
    rows = exported(target, tmp_path_factory.mktemp("job"), "messages", asked)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(target), AutoTokenizer.from_pretrained(target)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for row, messages in zip(rows, asked, strict=True):
        tokens = row["input_ids"]
        [(first, last)] = stretches(row["loss_mask"])
        assert last == len(tokens)
        check_answer(model, tokens, first, last, end)
        # Control tokens that somebody wrote are text for us and would act for transformers: compare what is not.
        if not any("<|im_" in message["content"] for message in messages):
            again = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
            assert tokens[:first] == again["input_ids"]


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    template=st.sampled_from(sorted(TEMPLATES)),
    asked=st.lists(st.lists(TEXTS, min_size=1, max_size=4), min_size=1, max_size=4),
)
def test_of_a_conversation_answered_turn_by_turn_it_is_on_every_answer(
    targets: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, template: str, asked: list[list[str]]
) -> None:
    target = targets[template]
    rows = exported(target, tmp_path_factory.mktemp("job"), "turns", asked)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(target), AutoTokenizer.from_pretrained(target)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for row, turns in zip(rows, asked, strict=True):
        tokens, own = row["input_ids"], stretches(row["loss_mask"])
        assert len(own) == len(turns)
        assert own[-1][1] == len(tokens)
        for start, stop in own:
            check_answer(model, tokens, start, stop, end)
        messages: list[Message] = []
        before = 0
        for turn, (start, stop) in zip(turns, own, strict=True):
            messages.append({"role": "user", "content": turn})
            text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            # What the template puts between one answer and the next, without the end token that the target wrote.
            between = text.rpartition("ANSWER")[2] if before else text
            if before and tokens[before - 1] == end:
                between = between.removeprefix("<|im_end|>")
            if "<|im_" not in turn:
                assert tokens[before:start] == tokenizer.encode(between, add_special_tokens=False)
            assert tokenizer.decode(tokens[before:start]) == between
            messages.append({"role": "assistant", "content": "ANSWER"})
            before = stop


def test_hidden_states_of_conversations_have_the_same_mask(targets: dict[str, Path], tmp_path: Path) -> None:
    rows = exported(targets["chatml"], tmp_path, "turns", [["fox", "the lazy dog", "fox"], ["2 + 2"]])
    loaded = spec.load(str(tmp_path / "job.yaml"))
    features.run(loaded, layers=[0, 1])
    [(_, found)] = features.read(store.connect(str(tmp_path), {}), str(tmp_path / "out/__batchgen/features"))
    masks = [tensors["loss_mask"].tolist() for _, tensors in found]
    assert masks == [row["loss_mask"] for row in rows]
    assert [len(stretches(mask)) for mask in masks] == [3, 1]
