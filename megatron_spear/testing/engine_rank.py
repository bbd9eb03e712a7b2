"""One tensor-parallel rank of an engine that is not there: a process with SGLang's loader.

``python -m megatron_spear.testing.engine_rank`` obeys pickled commands on standard input and
answers on standard output. It imports what SGLang's own process would import of this package.
"""

import os
import pickle
import signal
import sys
from typing import Any, BinaryIO

import torch

from megatron_spear.weight_sync.receivers import sglang
from megatron_spear.weight_sync.sharded.link import Link


class Rank:
    """Its commands; each returns what is answered."""

    def __init__(self) -> None:
        self._model = torch.nn.Module()

    def build(self, parameters: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
        """A model with parameters of these names, all zero."""
        self._model = torch.nn.Module()
        for name, (shape, dtype) in parameters.items():
            *path, last = name.split(".")
            module = self._model
            for part in path:
                if part not in module._modules:
                    module.add_module(part, torch.nn.Module())
                module = module.get_submodule(part)
            value = torch.nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False)
            module.register_parameter(last, value)

    def load(self, payload: bytes) -> None:
        """What SGLang does with a payload."""
        sglang.load(self._model, pickle.loads(payload))

    def parameters(self) -> dict[str, torch.Tensor]:
        """The present ones."""
        return {name: p.detach() for name, p in self._model.named_parameters()}

    def stored(self) -> dict[str, torch.Tensor]:
        """Their bytes, since FP8 tensors cannot be pickled."""
        return {name: p.view(torch.uint8) for name, p in self.parameters().items()}

    def fail(self, how: str, after: int) -> None:
        """``die`` or ``hang`` when ``after`` messages have come."""
        wait = Link.wait
        left = after

        def faulty(link: Link, work: Any, deadline: Any) -> None:
            nonlocal left
            wait(link, work, deadline)
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL if how == "die" else signal.SIGSTOP)

        Link.wait = faulty  # type: ignore[method-assign, assignment]


def main(commands: BinaryIO, answers: BinaryIO) -> None:
    """Obey until the input ends."""
    torch.set_num_threads(1)
    rank = Rank()
    while True:
        try:
            name, args = pickle.load(commands)
        except EOFError:
            return
        pickle.dump(getattr(rank, name)(*args), answers)
        answers.flush()


if __name__ == "__main__":
    main(sys.stdin.buffer, sys.stdout.buffer)
