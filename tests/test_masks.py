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

from batchgen import export, job, spec

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


def conversations() -> st.SearchStrategy[list[list[Message]]]:
    text = st.lists(st.sampled_from(WORDS), min_size=1, max_size=4).map(" ".join)
    turns = st.lists(text, min_size=1, max_size=5).filter(lambda texts: len(texts) % 2)
    system = st.none() | text

    def messages(parts: tuple[str | None, list[str]]) -> list[Message]:
        said: list[Message] = [
            {"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(parts[1])
        ]
        return said if parts[0] is None else [{"role": "system", "content": parts[0]}, *said]

    return st.lists(st.tuples(system, turns).map(messages), min_size=1, max_size=4)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(template=st.sampled_from(sorted(TEMPLATES)), asked=conversations())
def test_the_mask_is_on_the_targets_own_tokens(
    targets: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, template: str, asked: list[list[Message]]
) -> None:
    folder, target = tmp_path_factory.mktemp("job"), targets[template]
    ids = [f"row-{i}" for i in range(len(asked))]
    pl.DataFrame({"id": ids, "messages": asked}).write_parquet(folder / "in.parquet")
    sections: dict[str, Any] = {
        "input": {"path": str(folder / "in.parquet"), "messages": "messages", "id": "id"},
        "model": {"target": str(target), "dtype": "float32"},
        "sampling": {"max_tokens": 12},
        "output": {"path": str(folder / "out")},
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(sections))
    loaded = spec.load(str(folder / "job.yaml"))
    job.submit(loaded)
    export.run(loaded, "speculators", str(folder / "data"), export.Selection())
    lines = [line for file in (folder / "data").glob("*.jsonl") for line in file.read_text().splitlines()]
    rows = {row["primary_id"]: row for row in map(json.loads, lines)}
    assert sorted(rows) == ids
    model, tokenizer = AutoModelForCausalLM.from_pretrained(target), AutoTokenizer.from_pretrained(target)
    for name, messages in zip(ids, asked, strict=True):
        tokens, mask = rows[name]["input_ids"], rows[name]["loss_mask"]
        first = mask.index(1)
        assert mask == [0] * first + [1] * (len(tokens) - first)
        with torch.no_grad():
            likeliest = model(torch.tensor([tokens])).logits[0].argmax(-1).tolist()
        assert tokens[first:] == likeliest[first - 1 : -1]
        end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        assert end not in tokens[first:-1]
        assert tokens[-1] == end or len(tokens) - first == 12
        # Control tokens that somebody wrote are text for us and would act for transformers: compare what is not.
        if not any("<|im_" in message["content"] for message in messages):
            again = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
            assert tokens[:first] == again["input_ids"]
