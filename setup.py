"""Package metadata; tool settings live in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
# Grading by value, and DAPO-Math-17k as it is published.
MATH = ["math-verify[antlr4-13-2]>=0.9,<0.10", "pyarrow>=15"]
WEBSHOP = ["bm25s>=0.3", "PyStemmer>=3.0", "rapidfuzz>=3.14"]

setup(
    name="megatron-spear",
    version="0.1.0",
    description="SPEAR (self-imitation with progressive exploration) on Megatron-Core",
    long_description=(HERE / "README.md").read_text() if (HERE / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_spear", "megatron_spear.*"]),
    package_data={
        "megatron_spear": ["py.typed"],
        "megatron_spear.report": ["assets/*"],
    },
    install_requires=[
        "torch>=2.13",
        "megatron-core>=0.16.1,<0.20",
        "transformers>=5.16,<6",
        "tokenizers>=0.22",
        "safetensors>=0.7",
        "pydantic>=2.12,<3",
        "PyYAML>=6",
        "rich>=14",
        "numpy>=2",
        "xxhash>=3.5",
        "aiohttp>=3.13",
        "wandb>=0.25",
        "matplotlib>=3.9",
    ],
    extras_require={
        "gem": ["gem-llm>=0.1"],
        "gymnasium": ["gymnasium>=1.2"],
        "reasoning-gym": ["reasoning-gym>=0.1.25"],  # its pycosat needs a C compiler
        "skyrl-gym": ["skyrl-gym>=0.4"],
        "verifiers": ["verifiers>=0.4"],
        "bridge": ["megatron-bridge>=0.6; python_version >= '3.12'"],
        "webshop": WEBSHOP,
        "dev": [
            *WEBSHOP,
            "pytest>=9",
            "pytest-xdist>=3.8",
            "pytest-timeout>=2.4",
            "hypothesis>=6.150",
            "ruff>=0.17",
            "mypy>=2.4",
            "import-linter>=2.16",
            "types-PyYAML",
            "psutil",
            "gymnasium>=1.2",
            "mkdocs-material>=9.8,<10",  # the documentation as a site; brings mkdocs 1
            "accelerate>=1.10",  # transformers reads GGUF files and FP8 folders with it
            *MATH,
        ],
        "math": MATH,
    },
    entry_points={"console_scripts": ["megatron-spear = megatron_spear.cli.main:main"]},
)
