"""What SLURM's ``srun`` and the MPI need to start ranks together: PMIx on both sides."""

import re
from dataclasses import dataclass
from pathlib import Path

from hvd_ext.cli import toolchain
from hvd_ext.cli.finding import REBUILD, Finding

# Components of Open MPI 4 that are not a PMIx of its own or of the machine.
_OTHER = {"isolated", "flux", "cray", "s1", "s2"}


@dataclass(frozen=True)
class Slurm:
    """SLURM's launcher.

    Args:
        srun: its path.
        kinds: what ``srun --mpi=list`` knows, such as ("none", "pmi2", "pmix").
        pmix: whether Open MPI has a PMIx client; None where it does not say.
    """

    srun: str
    kinds: tuple[str, ...]
    pmix: bool | None


def look_for_slurm(srun: str | None, mpirun: str | None, open_mpi: int) -> Slurm | None:
    """SLURM as this machine has it; None without ``srun``.

    Args:
        srun: path, or None.
        mpirun: path, or None; ``ompi_info`` is beside it.
        open_mpi: Open MPI's major version, 0 for another MPI.
    """
    if srun is None:
        return None
    return Slurm(srun, parse_kinds(toolchain.output_of([srun, "--mpi=list"])), _has_pmix(mpirun, open_mpi))


def parse_kinds(listed: str) -> tuple[str, ...]:
    """The names in what ``srun --mpi=list`` prints, which differs from version to version.

    Old versions write "srun: pmix" a line, newer ones the name alone, and "specific pmix plugin
    versions available: pmix_v4" behind them.
    """
    found = []
    for line in listed.splitlines():
        words = re.sub(r"^srun:", "", line).strip()
        if re.fullmatch(r"[a-z][a-z0-9_]*", words):
            found.append(words)
        elif ":" in words:
            found += [word for word in re.split(r"[,\s]+", words.partition(":")[2]) if word]
    return tuple(dict.fromkeys(found))


def _has_pmix(mpirun: str | None, open_mpi: int) -> bool | None:
    if mpirun is None or open_mpi == 0:
        return None
    if open_mpi >= 5:
        return True  # it cannot be built without
    listed = toolchain.output_of([str(Path(mpirun).parent / "ompi_info"), "--parsable"])
    names = {line.split(":")[2] for line in listed.splitlines() if line.startswith("mca:pmix:")}
    return bool(names - _OTHER) if names else None


def pmix_finding(slurm: Slurm, mpi: bool) -> Finding:
    """Whether ``srun --mpi=pmix`` starts Horovod's ranks here.

    Args:
        mpi: whether Horovod is built with MPI.
    """
    inside = "inside of an allocation: mpirun ... or horovodrun --gloo ... (hvd-ext launch prints the line)"
    if not mpi:
        value = "Horovod is built without MPI: ranks of srun would not know each other"
        return Finding("SLURM", value, "note", REBUILD)
    if not any(kind.startswith("pmix") for kind in slurm.kinds):
        return Finding("SLURM", f"srun has no PMIx, it knows {', '.join(slurm.kinds) or 'nothing'}",
                       "note",
                       inside)
    if slurm.pmix is False:
        return Finding("SLURM", "srun has PMIx, but this Open MPI is built without", "note", inside)
    client = "" if slurm.pmix else "; whether this MPI has PMIx is not known"
    return Finding("SLURM", f"srun --mpi=pmix ({slurm.srun}){client}")
