"""A rank that ends in some way; ``python -m tests.core.ending_program HOW``."""

import os
import signal
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    how = sys.argv[1]
    assert os.environ["HVD_EXT_ENDS"] == how
    if how == "exit":
        sys.exit(3)
    if how == "raise":
        raise ValueError("planted")
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "abort":
        os.abort()
    if how == "sleep":
        hidden = Path(os.environ["HVD_EXT_PID"] + ".part")
        hidden.write_text(str(os.getpid()))
        hidden.rename(os.environ["HVD_EXT_PID"])
        time.sleep(60)
    print("the end")
