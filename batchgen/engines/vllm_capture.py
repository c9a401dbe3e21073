"""Hidden states of finished rows by vLLM: its `extract_hidden_states`, which hands them over as files of a row each."""

from __future__ import annotations

import fcntl
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch

from batchgen.engines import vllm_process
from batchgen.errors import EngineError, SpecError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

_AGAIN = "run the same command again to go on"
# Of all that vLLM draws from a row, nothing is wanted.
_PARAMETERS: dict[str, Any] = {"temperature": 0.0, "max_tokens": 1, "detokenize": False}


class VllmCapture:
    """The `Capture` of engine kind vllm; `options` as for `vllm.VllmEngine`.

    Raises:
        SpecError: vLLM has no such option, or refuses its value.
        ModelError: vLLM is not installed, or cannot run the model.
    """

    def __init__(
        self,
        target: Path,
        layers: Sequence[int],
        *,
        dtype: str,
        out_dtype: torch.dtype,
        device: str,
        batch_size: int,
        options: Mapping[str, Any],
    ) -> None:
        if "kv_transfer_config" in options:
            raise SpecError("engine.options.kv_transfer_config: hidden states are handed over through it; leave it out")
        self._dtype = out_dtype
        self._folder = Path(tempfile.mkdtemp(prefix="batchgen-states-"))
        connector = {"kv_connector": "ExampleHiddenStatesConnector"}
        if device == "cpu":
            connector = {"kv_connector": "CpuHiddenStates"}
            connector["kv_connector_module_path"] = "batchgen.engines.vllm_connector"
        ours = {
            "enable_prefix_caching": False,  # what is not computed is not captured
            "speculative_config": {
                "method": "extract_hidden_states",
                "num_speculative_tokens": 1,
                "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": list(layers)}},
            },
            "kv_transfer_config": connector
            | {"kv_role": "kv_producer", "kv_connector_extra_config": {"shared_storage_path": str(self._folder)}},
        }
        self._next_id = 0
        try:
            given = vllm_process.arguments_of(
                target, dtype=dtype, batch_size=batch_size, device=device, options=options
            )
            self._engine = vllm_process.launch(given | ours, device)
        except BaseException:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise
        # One token more is drawn from each row.
        self.max_tokens = int(self._engine.model_config.max_model_len) - 1

    def states(self, rows: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """[S, L, H] on the CPU for each row of S token ids, in their order.

        Raises:
            EngineError: vLLM's process died, or was told to end.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        first = self._next_id
        self._next_id += len(rows)
        sampling = SamplingParams(**_PARAMETERS, output_kind=RequestOutputKind.FINAL_ONLY)
        found: list[torch.Tensor | None] = [None] * len(rows)
        try:
            for i, ids in enumerate(rows):
                self._engine.add_request(str(first + i), {"prompt_token_ids": list(ids)}, sampling)
            while self._engine.has_unfinished_requests():
                for output in self._engine.step():
                    if output.outputs[0].finish_reason == "abort":  # vLLM's process was told to end
                        continue
                    i = int(output.request_id) - first
                    found[i] = self._load(Path(output.kv_transfer_params["hidden_states_path"]), rows[i])
        except Exception as error:
            if not vllm_process.died(error):
                raise
            raise EngineError(f"vLLM's process died while it read hidden states; {_AGAIN}") from error
        read = [states for states in found if states is not None]
        if len(read) < len(rows):
            raise EngineError(f"vLLM's process ended with {len(rows) - len(read)} rows unread; {_AGAIN}")
        return read

    def _load(self, file: Path, ids: Sequence[int]) -> torch.Tensor:
        lock = Path(f"{file}.lock")
        with lock.open() as held:
            fcntl.flock(held, fcntl.LOCK_SH)  # its writer lets go when the file is whole, or dead
        if not file.exists():
            raise EngineError(f"vLLM did not write the hidden states of a row; what it printed says why; {_AGAIN}")
        stored = safetensors.torch.load_file(file)
        assert stored["token_ids"].tolist() == list(ids)
        file.unlink()
        lock.unlink()
        return stored["hidden_states"].to(self._dtype)

    def close(self) -> None:
        """End vLLM's process."""
        self._engine.engine_core.shutdown()
        shutil.rmtree(self._folder, ignore_errors=True)
