"""vLLM's HTTP API: token in, token out generation, pauses and weight updates.

The server must be started with::

    VLLM_SERVER_DEV_MODE=1 vllm serve FOLDER --enable-scale-out \\
        --logprobs-mode processed_logprobs --weight-transfer-config '{"backend": ...}'

Facts about vLLM 0.32 that this file rests on:

- Log-probs are of the raw distribution by default (``raw_logprobs``), whatever the temperature;
  with ``processed_logprobs`` they are of the distribution drawn from, and of the raw one at
  temperature 0, as ``SamplingParams`` has it. ``inspect`` refuses another mode.
- ``ignore_eos`` switches the model's own end tokens off and leaves ``stop_token_ids`` on.
- ``/inference/v1/generate`` knows a request as ``generate-tokens-<request_id>`` when it is aborted.
- ``/pause?mode=keep`` with ``clear_cache`` preempts what runs: its prefix is computed anew after
  ``/resume``, with whatever weights there are then. That is our ``retract``.
- A number that is not finite comes as -9999.
- vLLM takes broadcasts by a weight transfer backend. Its own ``nccl`` one is for trainers that
  bring its communicator; ours takes the fields that ``join_group`` and ``receive_broadcast`` send.
"""

import base64
import json
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from megatron_spear.errors import EngineError
from megatron_spear.rollout.engine import GenerationRequest, PauseMode, SamplingParams
from megatron_spear.rollout.engines.http import JsonClient, ServerBusy
from megatron_spear.rollout.engines.sampling import seed_key
from megatron_spear.rollout.engines.server import (
    Answer,
    Group,
    ServerInfo,
    Tensor,
    label_runs,
    malformed,
    read_generation,
    weight_version,
)

_SEED_BITS = 0x7FFF_FFFF
_NOT_FINITE = -9999.0
_PAUSES: dict[PauseMode, str] = {"retract": "keep", "abort": "abort"}


class VLLMServer:
    """An ``EngineServer``.

    Args:
        url: ``http://host:port`` of a server started as above.
        update_deadline_s: longest single call of a weight update or pause.
        probe_deadline_s: longest wait for an answer that takes no work: a health check, an abort.
    """

    def __init__(self, url: str, *, update_deadline_s: float, probe_deadline_s: float) -> None:
        self._http = JsonClient(url, deadline_s=update_deadline_s)
        self.name = self._http.url
        self._probe_deadline_s = probe_deadline_s

    async def inspect(self) -> ServerInfo:
        """See ``EngineServer``; raises EngineError for log-probs of another distribution."""
        # The first answer takes seconds: vLLM collects facts about its machine for it.
        info = await self._http.get("/server_info?config_format=json")
        try:
            config = info["vllm_config"]
            model, parallel = config["model_config"], config["parallel_config"]
            mode, replicas = model["logprobs_mode"], int(parallel["data_parallel_size"])
            ranks = int(parallel["tensor_parallel_size"]) * int(parallel["pipeline_parallel_size"])
            found = ServerInfo(max_context=int(model["max_model_len"]), num_ranks=ranks)
        except (KeyError, TypeError, ValueError) as error:
            what = f"/server_info that cannot be read ({type(error).__name__}: {error})"
            raise malformed(self.name, what, info) from None
        if mode != "processed_logprobs":
            raise EngineError(
                f"{self.name} gives {mode}; expected log-probs of the distribution drawn from: "
                "start vLLM with --logprobs-mode processed_logprobs"
            )
        if replicas != 1:
            raise EngineError(
                f"{self.name} was started with --data-parallel-size {replicas}; start one server "
                "for each replica and list them all"
            )
        return found

    async def label(self) -> str:
        """See ``EngineServer``. The engine's own process answers, not the front alone."""
        return await weight_version(self._http, "/weight_info", self._probe_deadline_s)

    async def generate(
        self, request: GenerationRequest, token_ids: list[int], max_new_tokens: int, rid: str
    ) -> Answer:
        """See ``EngineServer``."""
        drawn = len(token_ids) - len(request.token_ids)
        # vLLM's noise is keyed by the request alone: what goes on must not start with the same.
        key = seed_key(request.seed)
        seed = (seed_key((key, drawn)) if drawn else key) & _SEED_BITS
        body = (
            f'{{"request_id": "{rid}", "token_ids": {token_ids}, "sampling_params": '
            f'{{"max_tokens": {max_new_tokens}, "seed": {seed}, {_sampling(request.sampling)}}}}}'
        )
        answer = await self._http.post_until_cancelled("/inference/v1/generate", body.encode())
        return read_generation(self.name, answer, _answer)

    async def abort(self, rid: str) -> None:
        """See ``EngineServer``."""
        body = {"request_ids": [f"generate-tokens-{rid}"]}
        await self._http.post("/abort_requests", body, deadline_s=self._probe_deadline_s)

    async def pause(self, mode: PauseMode) -> None:
        """See ``EngineServer``."""
        await self._http.post(f"/pause?mode={_PAUSES[mode]}&clear_cache=true", {})

    async def resume(self) -> None:
        """See ``EngineServer``."""
        await self._http.post("/resume", {})

    async def release_memory(self) -> None:
        """See ``EngineServer`` (``--enable-sleep-mode``)."""
        await self._http.post("/sleep?level=2&mode=abort", {})

    async def resume_memory(self) -> None:
        """See ``EngineServer``."""
        await self._http.post("/wake_up", {})

    async def parameter_names(self) -> frozenset[str] | None:
        """None: vLLM's checksums are of its own parameters, rank by rank, and cost a pass over
        them; its loaders refuse what they do not know."""
        return None

    async def begin_update(self) -> None:
        """See ``EngineServer``. A session that somebody left open is closed first."""
        try:
            await self._http.post("/start_weight_update", {})
        except ServerBusy:  # an open session is a failure in a worker, of which vLLM says no more
            await self._http.post("/finish_weight_update", {})
            await self._http.post("/start_weight_update", {})

    async def end_update(self, label: str) -> None:
        """See ``EngineServer``."""
        await self._http.post("/finish_weight_update", {})
        await self._drop_caches()
        await self.relabel(label)

    async def load_folder(self, folder: str, label: str) -> None:
        """See ``EngineServer``."""
        body = {"method": "reload_weights", "kwargs": {"weights_path": folder}}
        await self._http.post("/collective_rpc", body)
        await self._drop_caches()
        await self.relabel(label)

    async def relabel(self, label: str) -> None:
        """See ``EngineServer``."""
        answer = await self._http.post("/update_weight_version", {"new_version": label})
        if not isinstance(answer, dict) or answer.get("success") is not True:
            raise malformed(self.name, "/update_weight_version with no success", answer)

    async def join_group(self, group: Group, first_rank: int) -> None:
        """See ``EngineServer``. The server leaves the group that it was in."""
        info = {
            "master_address": group.host,
            "master_port": group.port,
            "rank_offset": first_rank,
            "world_size": group.world_size,
            "group_name": group.name,
            "group_backend": group.backend,
        }
        await self._http.post("/init_weight_transfer_engine", {"init_info": info})

    async def leave_group(self, name: str) -> None:
        """See ``EngineServer``; a server is in one group at most."""
        await self._http.post("/shutdown_weight_transfer_engine", {})

    async def receive_broadcast(self, tensors: Sequence[Tensor], group: str) -> None:
        """See ``EngineServer``."""
        info = {
            "names": [tensor.name for tensor in tensors],
            "dtype_names": [str(tensor.dtype).removeprefix("torch.") for tensor in tensors],
            "shapes": [list(tensor.shape) for tensor in tensors],
        }
        await self._http.post("/update_weights", {"update_info": info})

    async def receive_payloads(self, payloads: Sequence[bytes], load_format: str | None) -> None:
        """See ``EngineServer``: a list of updates, one a rank."""
        infos = [
            {"payload": base64.b64encode(payload).decode(), "load_format": load_format}
            for payload in payloads
        ]
        await self._http.post("/update_weights", {"update_info": infos})

    async def close(self) -> None:
        """See ``EngineServer``."""
        await self._http.close()

    async def _drop_caches(self) -> None:
        """Contexts of the old weights are forgotten, also those of requests that wait."""
        path = "/reset_prefix_cache?reset_running_requests=true"
        answer = await self._http.post(path, {})
        if not isinstance(answer, dict) or answer.get("success") is not True:
            raise EngineError(f"{self.name} kept cached contexts of its old weights: {answer}")


@lru_cache(maxsize=64)
def _sampling(sampling: SamplingParams) -> str:
    """The part of ``sampling_params`` that many requests share, as JSON without its braces."""
    shared = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": -1,
        "min_p": 0.0,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "repetition_penalty": 1.0,
        "stop_token_ids": list(sampling.stop_token_ids),
        "ignore_eos": True,
        "logprobs": 0,
        "detokenize": False,
    }
    return json.dumps(shared)[1:-1]


def _answer(answer: Any) -> Answer:
    """What the server answered; raises KeyError and the like where it is of another form."""
    (choice,) = answer["choices"]
    kind = choice["finish_reason"]
    if kind == "abort":
        return Answer(token_ids=[], logprobs=[], reason="abort", labels=[])
    if kind not in ("stop", "length"):
        raise ValueError(f"finish_reason {kind!r}")
    drawn = choice["logprobs"]["content"]
    token_ids = [entry["token_id"] for entry in drawn]
    if choice["token_ids"] != token_ids:
        raise ValueError("token_ids are not those of logprobs")
    values = [entry["logprob"] for entry in drawn]
    logprobs = [value if value > _NOT_FINITE else math.nan for value in values]
    labels = label_runs(choice["weight_versions"], len(token_ids))
    return Answer(token_ids=token_ids, logprobs=logprobs, reason=kind, labels=labels)
