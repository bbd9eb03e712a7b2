"""Names that Megatron's annotations ask for; the fused operations themselves are not there."""


class Sequential: ...


class FusibleOperation: ...
