"""What every engine promises (`batchgen.generate`), held against each kind through the same doors."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from batchgen import engines, models, spec
from batchgen.engines.rehearsal import RehearsalEngine, Script
from batchgen.engines.torch.engine import TorchEngine
from batchgen.engines.torch.linear import multiplies_bfloat16
from batchgen.engines.torch.target import Target
from batchgen.errors import ModelError, SpecError
from batchgen.record import Request, Sampling

ROOT = Path(__file__).parents[2]
TINY = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "eos_token_id": 299,
    "bos_token_id": 298,
    "pad_token_id": 299,
}


def tiny(folder: Path, kind: str, **changes) -> Path:
    """A random model of the given architecture, small enough to run in milliseconds."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(TINY | changes)))
    model.save_pretrained(folder)
    return folder


def decode(ids: list[int]) -> str:
    return "".join(chr(97 + i % 26) for i in ids)


def torch_engine(folder: Path, batch_size: int, **options) -> TorchEngine:
    target = Target(folder, torch.float32, torch.device("cpu"))
    return TorchEngine(target, None, decode=decode, batch_size=batch_size, **options)


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> Path:
    return tiny(tmp_path_factory.mktemp("llama"), "llama")


class Vllm:
    """A real vLLM with the demo model, kept from test to test, since starting takes half a minute."""

    def __init__(self) -> None:
        self.engine = None

    def running(self):
        if self.engine is None or self.engine._engine is None:
            job = spec.load(
                str(ROOT / "jobs/quickstart.yaml"),
                [
                    "engine.kind=vllm",
                    "model.dtype=float32",
                    "speculation.tree=off",
                    "batch_size=4",
                    "engine.options.max_model_len=256",
                    "engine.options.gpu_memory_utilization=0.2",  # another test process starts one, too
                ],
            )
            target = models.fetch(job.model.target)
            # Stop strings are found inside vLLM, by the model's own tokenizer.
            tokenizer = AutoTokenizer.from_pretrained(target.path)
            self.engine = engines.build(job, target, None, tokenizer.decode, ROOT)
        return self.engine


@pytest.fixture(scope="session")
def vllm():
    held = Vllm()
    yield held
    if held.engine is not None:
        held.engine.close()


KINDS = ["torch", "rehearsal"]
if importlib.util.find_spec("vllm") is not None:
    KINDS.append("vllm")


@pytest.fixture(params=KINDS)
def engine(request, llama, vllm):
    if request.param == "torch":
        return torch_engine(llama, 4)
    return vllm.running() if request.param == "vllm" else RehearsalEngine(batch_size=4, script=Script())


def ask(i: int, **sampling) -> Request:
    prompt = [(7 * i + 3 * j) % 290 for j in range(3 + i % 5)]
    return Request(("key", i), f"row {i}", 0, prompt, Sampling(**({"max_tokens": 12} | sampling)))


def finish(engine) -> dict:
    done = {}
    for _ in range(10_000):
        if not engine.unfinished:
            return done
        for completion in engine.step():
            assert completion.key not in done
            done[completion.key] = completion
    raise AssertionError("does not end")


def test_every_request_comes_back_once_under_its_key(engine):
    for i in range(11):
        engine.submit(ask(i))
    assert engine.unfinished == 11
    done = finish(engine)
    assert set(done) == {("key", i) for i in range(11)}
    for c in done.values():
        assert c.finish_reason in ("stop", "length")
        assert 1 <= len(c.token_ids) <= 12
        assert (c.finish_reason == "length") == (len(c.token_ids) == 12) or c.finish_reason == "stop"
        assert min(c.queue_s, c.prefill_s, c.decode_s) >= 0


def test_no_more_than_the_batch_size_run_at_once(engine):
    for i in range(11):
        engine.submit(ask(i))
    while engine.unfinished:
        engine.step()
        assert engine.running <= 4 <= engine.capacity


def test_requests_may_be_added_while_others_run(engine):
    engine.submit(ask(0, max_tokens=40))
    done = {}
    for i in range(1, 9):
        engine.submit(ask(i))
        done |= {c.key: c for c in engine.step()}
    done |= finish(engine)
    assert len(done) == 9


def test_tokens_depend_on_the_request_alone(engine):
    hot = {"temperature": 1.0, "seed": 5}
    for i in range(6):
        engine.submit(ask(i, **hot))
    together = finish(engine)
    for i in reversed(range(6)):
        engine.submit(ask(i, **hot))
        assert finish(engine)["key", i].token_ids == together["key", i].token_ids


def test_a_stop_string_is_not_part_of_the_text(engine):
    engine.submit(ask(1, max_tokens=60))
    whole = finish(engine)["key", 1].text
    stop = whole[4:6]
    engine.submit(ask(1, max_tokens=60, stop=(stop,)))
    c = finish(engine)["key", 1]
    assert c.text == whole[: whole.index(stop)]
    assert c.finish_reason == "stop"


def test_stop_speculating_and_close_are_always_allowed(engine):
    engine.submit(ask(0))
    engine.stop_speculating()
    engine.step()
    engine.close()
    assert engine.unfinished == 0


def test_a_scripted_failure_is_a_completion():
    engine = RehearsalEngine(batch_size=2, script=Script(fail=("row 1*",)))
    for i in range(3):
        engine.submit(ask(i))
    done = finish(engine)
    assert [done["key", i].finish_reason for i in range(3)] == ["length", "error", "length"]
    assert done["key", 1].error_type == "scripted"


def test_a_script_with_a_slip_is_refused_by_name():
    with pytest.raises(SpecError, match=r"engine\.options\.step"):
        Script.of({"step": 1})


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral"])
def test_any_standard_decoder_gives_the_tokens_of_transformers(tmp_path, kind):
    folder = tiny(tmp_path, kind, **({"sliding_window": None} if kind == "mistral" else {}))
    engine = torch_engine(folder, 3)
    for i in range(5):
        engine.submit(ask(i, max_tokens=20))
    done = finish(engine)
    model = AutoModelForCausalLM.from_pretrained(folder)
    for i in range(5):
        ids = torch.tensor([ask(i).prompt_token_ids])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
        assert done["key", i].token_ids == out[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("mistral", {"sliding_window": 64}, "sliding"),
        ("gemma2", {"head_dim": 8}, "final_logit_softcapping"),
    ],
)
def test_a_model_that_the_torch_engine_cannot_run_is_refused_with_the_way_out(tmp_path, kind, changes, words):
    folder = tiny(tmp_path, kind, **changes)
    with pytest.raises(ModelError, match=words) as caught:
        torch_engine(folder, 1)
    assert "engine.kind: vllm" in str(caught.value)


def test_an_encoder_decoder_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]})
    )
    with pytest.raises(ModelError, match="encoder-decoder"):
        torch_engine(tmp_path, 1)


def test_rows_wait_for_memory_and_one_that_never_fits_is_an_error(tmp_path):
    # Pools are made for 8 rows x 256 tokens at a time: room for 8 rows, and not for 16.
    folder = tiny(tmp_path, "llama", max_position_embeddings=4096)
    bound = torch_engine(folder, 1)._slots.num_bytes(8, 150)
    engine = torch_engine(folder, 16, memory_bytes=bound)
    engine.submit(ask(99, max_tokens=3000))
    for i in range(20):
        engine.submit(ask(i, max_tokens=20))
    running, done = [], {}
    while engine.unfinished:
        done |= {c.key: c for c in engine.step()}
        running.append(engine.running)
        [pool] = engine._slots.pools
        assert pool.k.nbytes + pool.v.nbytes <= bound
    assert max(running) == 8
    assert done["key", 99].error_type == "out_of_memory"
    assert all(done["key", i].finish_reason == "length" for i in range(20))


def test_a_pool_shaped_for_many_short_rows_makes_way_for_a_long_one(tmp_path):
    folder = tiny(tmp_path, "llama", max_position_embeddings=4096)
    bound = torch_engine(folder, 1)._slots.num_bytes(8, 400)
    engine = torch_engine(folder, 16, memory_bytes=bound)
    for i in range(16):
        engine.submit(ask(i, max_tokens=12))
    engine.submit(ask(16, max_tokens=400))
    assert len(finish(engine)["key", 16].token_ids) == 400


def test_positions_are_not_rounded_with_the_weights(tmp_path):
    """In bfloat16 the frequencies of rotary embeddings would be off by a third of a turn after some hundred tokens."""
    if not multiplies_bfloat16():
        pytest.skip("this CPU computes in float32, to which nothing is rounded")
    target = Target(tiny(tmp_path, "llama"), torch.bfloat16, torch.device("cpu"))
    exact = LlamaRotaryEmbedding(target.config)
    at = torch.tensor([[0, 1, 500]])
    for found, expected in zip(target._ours._rotary(torch.zeros(1), at), exact(torch.zeros(1), at), strict=True):
        assert torch.equal(found, expected)


def test_a_model_that_scales_its_logits_is_refused(tmp_path):
    folder = tiny(tmp_path, "granite", logits_scaling=8.0)
    with pytest.raises(ModelError, match=r"logits_scaling.*engine\.kind: vllm"):
        torch_engine(folder, 1)


def test_a_model_that_does_not_attend_through_the_interface_is_refused(tmp_path):
    folder = tiny(tmp_path, "stablelm")
    with pytest.raises(ModelError, match=r"StableLm.*engine\.kind: vllm"):
        torch_engine(folder, 1)


def test_a_row_ends_at_the_models_last_position(llama):
    engine = torch_engine(llama, 2)
    engine.submit(Request("long", "long", 0, list(range(120)), Sampling(max_tokens=50)))
    engine.submit(Request("too long", "too long", 0, list(range(128)), Sampling(max_tokens=50)))
    done = finish(engine)
    assert len(done["long"].token_ids) == 8
    assert done["long"].finish_reason == "length"
    assert done["too long"].error_type == "prompt_too_long"
