"""A synchronous training with checkpoints, of which one rank may strike itself.

``mpirun -np 2 python -m tests.soak.sync FRONT_END METHOD FOLDER [RANK STEP SHARE SIGNAL]``
"""

from __future__ import annotations

import importlib
import os
import sys

from tests.soak.fault_injection import Striker

STEPS, EVERY = 20, 3


def main(front_end: str, method: str, folder: str, rank: str = "-1", step: str = "0", share: str = "0",
         signal: str = "9") -> None:
    training = importlib.import_module(f"tests.{front_end}.checkpointed")
    hvd = training.hvd
    hvd.init()
    before = Striker(int(step), float(share), int(signal), EVERY).before_step \
        if hvd.rank() == int(rank) else lambda number: None
    first, digest = training.run(method, folder, STEPS, EVERY, before_step=before, keep=99)
    os.write(1, f"\nrank {hvd.rank()} from {first} to {digest}\n".encode())


if __name__ == "__main__":
    main(*sys.argv[1:])
