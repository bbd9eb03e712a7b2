"""SGLang's HTTP API: token in, token out generation, pauses and weight updates.

Facts about SGLang 0.5 that this file rests on:

- Log-probs are of the distribution drawn from, log-softmax of logits / temperature; temperature 0
  becomes greedy at temperature 1, so that they are of the raw distribution, as ``SamplingParams``
  has it. (The server's SGLANG_RETURN_ORIGINAL_LOGPROB would change that; do not set it.)
- The model's own end tokens stop a generation, whatever ``stop_token_ids`` says; ``ignore_eos``
  switches these off too. It is set where there are no stop tokens; otherwise a generation that one
  of the model's ends is gone on with (see ``drawing``).
- ``sampling_seed`` counts with ``--enable-deterministic-inference`` only.
- A token id outside the vocabulary ends the server: the fleet checks them.
- ``/health`` draws a token, and hangs while the server is paused; ``/model_info`` does not.
- The update calls take a label with each bucket, and answers would carry it before the last one:
  the label is set when the update ends.
"""

import base64
import json
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from json.encoder import encode_basestring_ascii
from typing import Any

from megatron_spear.errors import EngineError
from megatron_spear.rollout.engine import GenerationRequest, PauseMode, SamplingParams
from megatron_spear.rollout.engines.http import JsonClient, RequestRefused
from megatron_spear.rollout.engines.sampling import seed_key, signed_key
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


class SGLangServer:
    """An ``EngineServer``.

    Args:
        url: ``http://host:port`` of a server started with ``python -m sglang.launch_server``.
        update_deadline_s: longest single call of a weight update or pause.
        probe_deadline_s: longest wait for an answer that takes no work: health, settings, an abort.
    """

    def __init__(self, url: str, *, update_deadline_s: float, probe_deadline_s: float) -> None:
        self._http = JsonClient(url, deadline_s=update_deadline_s)
        self.name = self._http.url
        self._probe_deadline_s = probe_deadline_s

    async def inspect(self) -> ServerInfo:
        """See ``EngineServer``; raises EngineError for a server of several data-parallel parts,
        which takes no weights."""
        info = await self._http.get("/server_info", deadline_s=self._probe_deadline_s)
        try:
            ranks, replicas = int(info["tp_size"]), int(info.get("dp_size") or 1)
            found = ServerInfo(max_context=int(info["max_req_input_len"]), num_ranks=ranks)
        except (KeyError, TypeError, ValueError):
            what = "/server_info with no tp_size and max_req_input_len"
            raise malformed(self.name, what, info) from None
        if replicas != 1:
            raise EngineError(
                f"{self.name} was started with --dp-size {replicas}; SGLang updates the weights of "
                "dp_size 1 only: start one server for each replica and list them all"
            )
        return found

    async def label(self) -> str:
        """See ``EngineServer``."""
        return await weight_version(self._http, "/model_info", self._probe_deadline_s)

    async def generate(
        self, request: GenerationRequest, token_ids: list[int], max_new_tokens: int, rid: str
    ) -> Answer:
        """See ``EngineServer``."""
        seed = signed_key(seed_key(request.seed))
        body = (
            f'{{"rid": "{rid}", "input_ids": {token_ids}, "return_logprob": true, "stream": false, '
            f'"session_id": {encode_basestring_ascii(request.session)}, "sampling_params": '
            f'{{"max_new_tokens": {max_new_tokens}, "sampling_seed": {seed}, '
            f"{_sampling(request.sampling)}}}}}"
        )
        answer = await self._http.post_until_cancelled("/generate", body.encode())
        return read_generation(self.name, answer, _answer)

    async def abort(self, rid: str) -> None:
        """See ``EngineServer``."""
        await self._http.post("/abort_request", {"rid": rid}, deadline_s=self._probe_deadline_s)

    async def pause(self, mode: PauseMode) -> None:
        """See ``EngineServer``."""
        await self._http.post("/pause_generation", {"mode": mode})

    async def resume(self) -> None:
        """See ``EngineServer``."""
        await self._http.post("/continue_generation", {})

    async def flush_cache(self) -> None:
        """Drop cached contexts; RequestRefused while generations run."""
        await self._http.post_for_words("/flush_cache")

    async def release_memory(self) -> None:
        """See ``EngineServer`` (``--enable-memory-saver``)."""
        await self._http.post("/release_memory_occupation", {"tags": ["weights", "kv_cache"]})

    async def resume_memory(self) -> None:
        """See ``EngineServer``."""
        await self._http.post("/resume_memory_occupation", {"tags": ["weights", "kv_cache"]})

    async def parameter_names(self) -> frozenset[str] | None:
        """See ``EngineServer``: the server's own names, from its checksums."""
        answer = await self._http.post("/weights_checker", {"action": "checksum"})
        ranks = answer.get("ranks") if isinstance(answer, dict) else None
        if not ranks:
            return None
        return frozenset(name for rank in ranks for name in rank["checksums"])

    async def begin_update(self) -> None:
        """See ``EngineServer``. A session that somebody left open is closed first."""
        try:
            await self._update("/begin_weight_update", {})
        except RequestRefused as error:
            if "already open" not in str(error):
                raise
            await self._update("/end_weight_update", {})
            await self._update("/begin_weight_update", {})

    async def end_update(self, label: str) -> None:
        """See ``EngineServer``."""
        await self._update("/end_weight_update", {})
        await self.flush_cache()
        await self.relabel(label)

    async def load_folder(self, folder: str, label: str) -> None:
        """See ``EngineServer``."""
        body = {"model_path": folder, "weight_version": label, "flush_cache": True}
        await self._update("/update_weights_from_disk", body)

    async def relabel(self, label: str) -> None:
        """See ``EngineServer``."""
        body = {"new_version": label, "abort_all_requests": False}
        await self._update("/update_weight_version", body)

    async def join_group(self, group: Group, first_rank: int) -> None:
        """See ``EngineServer``."""
        await self._update(
            "/init_weights_update_group",
            {
                "master_address": group.host,
                "master_port": group.port,
                "rank_offset": first_rank,
                "world_size": group.world_size,
                "group_name": group.name,
                "backend": group.backend,
            },
        )

    async def leave_group(self, name: str) -> None:
        """See ``EngineServer``."""
        await self._update("/destroy_weights_update_group", {"group_name": name})

    async def receive_broadcast(self, tensors: Sequence[Tensor], group: str) -> None:
        """See ``EngineServer``. SGLang cuts the bytes where they are: each tensor's offset must be
        a multiple of its itemsize, or it fails."""
        await self._update(
            "/update_weights_from_distributed",
            {
                "names": [tensor.name for tensor in tensors],
                "dtypes": [str(tensor.dtype).removeprefix("torch.") for tensor in tensors],
                "shapes": [list(tensor.shape) for tensor in tensors],
                "group_name": group,
                "load_format": "flattened_bucket",
                "flush_cache": False,
            },
        )

    async def receive_payloads(self, payloads: Sequence[bytes], load_format: str | None) -> None:
        """See ``EngineServer``."""
        encoded = [base64.b64encode(payload).decode() for payload in payloads]
        await self._update(
            "/update_weights_from_tensor",
            {
                "serialized_named_tensors": encoded,
                "load_format": load_format,
                "flush_cache": False,
            },
        )

    async def close(self) -> None:
        """See ``EngineServer``."""
        await self._http.close()

    async def _update(self, path: str, body: Mapping[str, Any]) -> None:
        """A call that answers ``{"success": ..., "message": ...}``."""
        answer = await self._http.post(path, body)
        if not isinstance(answer, dict) or answer.get("success") is not True:
            raise malformed(self.name, f"{path} with no success", answer)


@lru_cache(maxsize=64)
def _sampling(sampling: SamplingParams) -> str:
    """The part of ``sampling_params`` that many requests share, as JSON without its braces.

    All that shapes the distribution is named, since the server may have defaults of its own.
    """
    shared = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": -1,
        "min_p": 0.0,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "repetition_penalty": 1.0,
        "stop_token_ids": list(sampling.stop_token_ids),
        "ignore_eos": not sampling.stop_token_ids,
    }
    return json.dumps(shared)[1:-1]


def _answer(answer: Any) -> Answer:
    """What ``/generate`` answered; raises KeyError and the like where it is of another form."""
    meta = answer["meta_info"]
    reason = meta["finish_reason"]
    kind = reason["type"]
    if kind == "abort":
        return Answer(token_ids=[], logprobs=[], reason="abort", labels=[])
    if kind not in ("stop", "length"):
        raise ValueError(f"finish_reason {kind!r}")
    drawn = meta["output_token_logprobs"]
    token_ids = [entry[1] for entry in drawn]
    # orjson writes null where the number is not finite.
    logprobs = [math.nan if entry[0] is None else entry[0] for entry in drawn]
    if answer["output_ids"] != token_ids:
        raise ValueError("output_ids are not those of output_token_logprobs")
    spans = meta.get("weight_versions")
    if spans is None:
        labels = [(meta["weight_version"], len(token_ids))]
    else:
        labels = label_runs(spans, len(token_ids))
    if reason.get("matched") == "NaN happened":
        logprobs = [math.nan] * len(token_ids)
    return Answer(token_ids=token_ids, logprobs=logprobs, reason=kind, labels=labels)
