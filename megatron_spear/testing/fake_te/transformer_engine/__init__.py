"""Stand-in for TransformerEngine; see ``megatron_spear.testing.fake_te``."""

from . import common, pytorch

__all__ = ["common", "pytorch"]
__version__ = "2.20.2+stand.in"
