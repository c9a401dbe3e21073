"""Train an EAGLE-3 head with the speculators trainer on an export of a job, on a GPU or on this machine's CPU.

    python examples/train_head/train.py --target demo:smollm2-135m --data data --to head -- --epochs 3

What follows `--` goes to `speculators train` and wins over what is set here. The head is written to `--to`, as both
engines load it. `--data` takes exports of the form `speculators-states`. With `--head` training goes on from that head.

Of speculators 0.9 three things are worked around: it insists on an accelerator, which on a CPU is answered by the CPU
itself; its fused loss and flex attention are for GPUs; and it trains a head in the type that it is stored in. Of torch
one: Muon computes in bfloat16, which CPUs without such instructions do twenty times as slowly as float32 (of a step of
1,024 tokens 23 s of 88 on two Zen 3 cores, where all of it in float32 takes 3). Needs
`pip install -e ".[train]"`; with a CPU build of torch then also `pip uninstall -y torchvision torchaudio`, which come
along built for CUDA.

The projection to the vocabulary stays as the target has it, which is how speculators trains, so `--vocab` can widen
a head at no cost: new rows are the target's own.

What a head learns on new prompts it pays for with some of what it knew of others. `--keep SHARE` mixes that much of the
weights that it began with into what was trained, which gave the demo's head both (WiSE-FT, arXiv 2109.01903).
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import load_file, save, save_file

from batchgen import models
from batchgen.engines.torch.linear import multiplies_bfloat16

# Attention over dense masks takes memory by the square of what is packed together; longer rows are cut.
ON_CPU = ["--draft-attn-impl=sdpa", "--loss-implementation=eager", "--num-workers=1", "--total-seq-len=1024"]
# As how often a token counts that a head proposes beside those in a set, where tokens are exchanged.
HELD = 6
# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def on_cpu() -> None:
    """Let the trainer take the CPU for its accelerator, and keep the memory that it has once had.

    glibc hands blocks of 32 MiB back when they are freed, and a step's logits are that large: with 11,776 draft tokens
    a step of 1,024 took 1.7 s, a third of it page faults, and 1.1 s with all memory kept.
    """
    from speculators.train import trainer

    with contextlib.suppress(AttributeError):  # another libc
        libc = ctypes.CDLL(None)
        for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1)):
            libc.mallopt(option, value)
    cpu = torch.device("cpu")
    torch.accelerator.current_accelerator = lambda *, check_available=False: cpu
    torch.accelerator.is_available = lambda: False
    torch.accelerator.synchronize = lambda device=None: None
    torch.accelerator.set_device_index = lambda device: None
    torch.cpu.empty_cache = lambda: None
    trainer.get_local_rank = lambda: cpu
    if not multiplies_bfloat16():
        torch.optim._muon._zeropower_via_newtonschulz = orthogonal  # noqa: SLF001
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or 0) or len(os.sched_getaffinity(0)))


def orthogonal(grad: torch.Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> torch.Tensor:
    """The Newton-Schulz iteration of Muon (Jordan et al., kellerjordan.github.io/posts/muon), in float32."""
    a, b, c = coefficients
    x = grad.T if grad.shape[0] > grad.shape[1] else grad
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if grad.shape[0] > grad.shape[1] else x


def joined(sets: list[Path], folder: Path) -> tuple[Path, float]:
    """One set of several exports, and its share to train on: the rows held out of each are the last."""
    if len(sets) == 1:
        return sets[0].absolute(), json.loads((sets[0] / "export.json").read_text())["train_data_ratio"]
    from datasets import concatenate_datasets, load_from_disk

    made = folder / "joined"
    (made / "hidden_states").mkdir(parents=True)
    learned, held_out = [], []
    tokens: Counter[int] = Counter()
    for each in sets:
        manifest, data = json.loads((each / "export.json").read_text()), load_from_disk(each)
        border = manifest["rows"] - manifest["held_out"]
        learned.append((each, data, range(border)))
        held_out.append((each, data, range(border, manifest["rows"])))
        tokens.update(torch.load(each / "token_freq.pt"))
    rows = [
        each.absolute() / f"hidden_states/hs_{row}.safetensors"
        for each, _, chosen in learned + held_out
        for row in chosen
    ]
    for number, states in enumerate(rows):
        (made / f"hidden_states/hs_{number}.safetensors").symlink_to(states)
    concatenate_datasets([data.select(chosen) for _, data, chosen in learned + held_out]).save_to_disk(made)
    torch.save(dict(tokens), made / "token_freq.pt")
    return made, (sum(len(chosen) for _, _, chosen in learned) + 0.5) / len(rows)


def begun(head: Path, folder: Path, target: Path, vocab: int, tokens: dict[int, int], *, exchange: bool) -> Path:
    """A copy of a head in float32 that has the target's embedding and says where on this machine the target is.

    The trainer takes an embedding that a checkpoint lacks for a new one, and draws it; and it trains weights in the
    type they are stored in. In bfloat16 small steps round to nothing, and AdamW's second moments stand still.

    If the head proposes fewer than `vocab` tokens, the most frequent others of `tokens` are added; with `exchange` some
    also take the place of those that it proposes, but `tokens` lacks. They are projected as the target does it.
    """
    config = json.loads((head / "config.json").read_text()) | {"dtype": "float32"}
    config["speculators_config"]["verifier"]["name_or_path"] = str(target)
    from speculators.utils.loading import load_model_layers

    copy = folder / "begun"
    copy.mkdir()
    targets = load_model_layers(["embed_tokens.weight", "lm_head.weight"], str(target))
    tensors = load_file(head / "model.safetensors")
    tensors.setdefault("embed_tokens.weight", targets["embed_tokens.weight"])
    full = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    size = max(vocab, config["draft_vocab_size"])
    if exchange or size > config["draft_vocab_size"]:
        projection = targets.get("lm_head.weight", targets["embed_tokens.weight"]).float()
        projection[full["t2d"]] = full["lm_head.weight"]
        worth = torch.zeros(len(projection))
        worth[list(tokens)] = torch.tensor(list(tokens.values()), dtype=torch.float32)
        worth[full["t2d"]] += HELD if exchange else torch.inf
        # In the target's order, as the trainer takes the target's logits.
        chosen = worth.argsort(descending=True, stable=True)[:size].sort().values
        full["t2d"] = torch.zeros_like(full["t2d"]).index_fill(0, chosen, 1)
        full["lm_head.weight"] = projection[chosen]
        full["d2t"] = chosen - torch.arange(size)
        config["draft_vocab_size"] = size
    (copy / "config.json").write_text(json.dumps(config))
    save_file(full, copy / "model.safetensors", {"format": "pt"})
    return copy


def publish(trained: Path, to: Path, target: str, before: Path | None, keep: float) -> None:
    """Write a trained checkpoint as engines take it, without its copy of the target's embedding.

    `keep` is the share of `before`, what it began as, in its weights.
    """
    config = json.loads((trained / "config.json").read_text())
    tensors = load_file(trained / "model.safetensors")
    if not config["embed_requires_grad"]:
        tensors.pop("embed_tokens.weight", None)
    for name, old in (load_file(before / "model.safetensors") if before and keep else {}).items():
        if old.is_floating_point() and name in tensors:
            tensors[name] = torch.lerp(tensors[name].float(), old.float(), keep).to(tensors[name].dtype)
    config.pop("auto_map", None)
    config["speculators_config"]["verifier"]["name_or_path"] = target
    to.mkdir(parents=True, exist_ok=True)
    (to / "model.safetensors").write_bytes(save(tensors, {"format": "pt"}))
    (to / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--target", required=True, help="the job's model.target")
    options.add_argument("--data", type=Path, required=True, nargs="+", help="exports of the form speculators-states")
    options.add_argument("--to", type=Path, required=True, help="folder for the head")
    options.add_argument("--head", help="a head in speculators format to go on from")
    options.add_argument("--vocab", type=int, help="how many tokens it can propose (8192; of --head as many as before)")
    options.add_argument("--exchange", action="store_true", help="let frequent tokens replace some that the set lacks")
    options.add_argument("--keep", type=float, default=0.0, help="share of its weights in those that are written")
    options.add_argument("trainer", nargs="*", help="further arguments of `speculators train`, after --")
    args = options.parse_args()
    if args.exchange and not args.head:
        options.error("--exchange changes what --head proposes: name the head")
    from speculators.train.cli import main as train
    from speculators.train.config import TrainConfig

    target = models.fetch(args.target)
    gpu = torch.cuda.is_available()
    if not gpu:
        on_cpu()
    beside = args.to.absolute().parent
    beside.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=beside, prefix=".training-") as folder:
        data, train_data_ratio = joined(args.data, Path(folder))
        settings = {
            "speculator-type": "eagle3",
            "verifier-name-or-path": target.path,
            "data-path": data,
            "save-path": folder,
            "on-missing": "raise",
            "ttt-steps": 3,
            "hidden-states-dtype": "bfloat16" if gpu or multiplies_bfloat16() else "float32",
            "train-data-ratio": train_data_ratio,
        }
        name, before = args.target, None
        if args.head:
            head = models.fetch(args.head).path
            tokens = torch.load(data / "token_freq.pt")
            before = begun(head, Path(folder), target.path, args.vocab or 0, tokens, exchange=args.exchange)
            settings["from-pretrained"] = before
            name = json.loads((head / "config.json").read_text())["speculators_config"]["verifier"]["name_or_path"]
        else:
            settings["draft-vocab-size"] = args.vocab or 8192
        given = [f"--{name}={value}" for name, value in settings.items()]
        given += [] if args.head else ["--norm-output", "--norm-before-fc", "--no-norm-before-residual"]
        train(TrainConfig.resolve([*given, *([] if gpu else ON_CPU), *args.trainer]))
        epochs = [each for each in Path(folder).iterdir() if each.name.isdigit()]
        if not epochs:
            sys.exit("the training ended before its first epoch; nothing is written")
        publish(max(epochs, key=lambda each: int(each.name)), args.to, name, before, args.keep)
    print(f"head: {args.to}")


if __name__ == "__main__":
    main()
