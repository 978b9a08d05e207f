"""One row of the doctor's table."""

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "note", "problem"]
REBUILD = "hvd-ext install-horovod"


@dataclass(frozen=True)
class Finding:
    """One row of the doctor's table.

    Args:
        subject: what it is about.
        value: what was found.
        level: "ok"; "note", worth knowing and stops nothing; "problem", must be fixed.
        remedy: the command (or the step) that fixes it; never empty for a problem.
    """

    subject: str
    value: str
    level: Level = "ok"
    remedy: str = ""

    def __post_init__(self) -> None:
        if self.level == "problem" and not self.remedy:
            raise ValueError(f"the problem with {self.subject} needs a remedy")
