"""``python -m megatron_spear.cli.train FILE``: the train command for torchrun and srun."""

import sys

from megatron_spear.cli.main import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
