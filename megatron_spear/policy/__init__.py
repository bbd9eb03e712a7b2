"""The Megatron-Core policy. Importing it first makes megatron importable where CUDA is absent."""

from megatron_spear.policy.cpu import install

install()
