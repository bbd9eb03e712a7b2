"""How much of what a chip can do is got: the few constants of all predicted times.

Four are fixed by published figures, one each (``published.py``), and checked on others. The rest
are measurements of the very thing, cited, or assumptions, which say so.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Constants:
    """Shares of a chip's peaks, and times that no peak explains."""

    matmul: float
    """Share of the peak that large matrix products reach. Fixed by a training run."""
    matmul_width: float = 256.0
    """A product whose smallest side is this wide gets half of ``matmul`` (assumed: two tiles of
    128; products of tokens and one expert are that narrow)."""
    attention: float = 0.60
    """Share of the bf16 peak of a fused attention kernel, forward, causal, 8,192 tokens, heads of
    128. 590-614 TFLOP/s of 989: github.com/pytorch/benchmark, pull request 2391."""
    attention_backward: float = 0.50
    """The same, backward, which has 2.5 times the work (arXiv 2407.08608, figure 6: 500-550)."""
    memory: float = 0.90
    """Share of the memory's bandwidth in long reads (calculon, systems/a100_80g.json, above
    100 MB)."""
    inside_node: float = 0.78
    """Share of NVLink's one-way bandwidth in collectives. 235 of 300 GB/s on 8 A100:
    github.com/stas00/ml-engineering, network/README.md."""
    between_nodes: float = 0.90
    """Share of the network adapters' bandwidth in collectives (calculon, same file)."""
    host: float = 0.80
    """Share of the bus between host and GPU memory (assumed)."""
    collective_s: float = 10e-6
    """Time of a collective of few bytes inside a node (assumed: one kernel on each rank)."""
    far_collective_s: float = 30e-6
    """The same between nodes (assumed: two network hops more)."""
    layer_s: float = 0.15e-3
    """Least time of a dense layer's forward pass: its launches (assumed: 30 of 5 us)."""
    experts_layer_s: float = 1e-3
    """Time of a layer with experts, a pass, that neither products nor bytes explain: counts read
    back by the host, sorting, small kernels (assumed: 60 launches and three waits)."""
    decode_layer_s: float
    """Time of a layer in a decode step that its bytes do not explain. Fixed by a decode
    benchmark."""
    decode_context_s: float
    """Host time of a sampled token: scheduling, sampling, log-probs, what becomes of it. Fixed by
    a rollout stage."""
    sync_layer_s: float
    """Time of a layer's tensors in a weight update that their bytes do not explain. Fixed by an
    update."""

    def of_matmul(self, *sides: float) -> float:
        """Share of the peak of a product with these sides.

        Example: 2,048 tokens x 768 x 2,048 gets 0.75 of ``matmul``.
        """
        narrow = min(sides)
        return self.matmul * narrow / (narrow + self.matmul_width)


CONSTANTS = Constants(
    matmul=0.5336,
    decode_layer_s=66.1e-6,
    decode_context_s=105e-6,
    sync_layer_s=13.33e-3,
)
"""What the figures of ``published.py`` that fix them give."""
