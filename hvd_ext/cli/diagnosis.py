"""What the facts about a machine mean: one line per subject, and for each problem what fixes it."""

import re
from pathlib import Path

from hvd_ext import kernels
from hvd_ext.cli import slurm
from hvd_ext.cli.environment import Facts, Framework, open_mpi_major
from hvd_ext.cli.finding import REBUILD, Finding, Level
from hvd_ext.cli.gpu_diagnosis import gpu_findings
from hvd_ext.cli.horovod_patches import ADVISORIES, SECURITY_EDITS
from hvd_ext.versions import HOROVOD, TENSORFLOW, TORCH

TESTED = {"torch": TORCH, "tensorflow": TENSORFLOW}
SECURED = {edit.path for edit in SECURITY_EDITS}
TITLES = {"torch": "PyTorch", "tensorflow": "TensorFlow"}


def diagnose(facts: Facts) -> list[Finding]:
    """All findings about ``facts``, in the order of the table."""
    rows = [_check_python(facts)]
    rows += [_check_framework(framework) for framework in facts.frameworks]
    rows += [_check_keras(facts), *_check_horovod(facts), _check_mpi(facts), _check_launcher(facts),
             _check_mpi4py(facts)]
    if facts.slurm is not None and usable_frameworks(facts):
        rows.append(slurm.pmix_finding(facts.slurm, _built_with(facts, "mpi")))
    rows += [_check_kernels(facts), *gpu_findings(facts), _check_cores(facts)]
    return rows


def usable_frameworks(facts: Facts) -> list[str]:
    """The frameworks that Horovod can run with here: both libraries import."""
    return [framework.name for framework in facts.frameworks if framework.horovod is not None]


def _check_python(facts: Facts) -> Finding:
    parts = tuple(int(part) for part in facts.python.split(".")[:2])
    if parts < (3, 10):
        remedy = "make a new environment: python3.12 -m venv .venv"
        return Finding("Python", f"{facts.python}; 3.10 or newer is needed", "problem", remedy)
    return Finding("Python", facts.python)


def _check_framework(framework: Framework) -> Finding:
    title = TITLES[framework.name]
    if framework.version is None:
        return Finding(title, "not installed", "note", f"pip install 'hvd-ext[{framework.name}]'")
    if framework.error:
        remedy = f"pip install --force-reinstall --no-deps {framework.name}=={framework.version}"
        value = f"{framework.version}, does not import: {framework.error}"
        return Finding(title, value, "problem", remedy)
    device = f"CUDA {framework.cuda}, {framework.gpus} GPU" if framework.cuda else "CPU"
    value = f"{framework.version} ({device})"
    if framework.version.split("+")[0] != TESTED[framework.name]:
        return Finding(title, f"{value}; tested with {TESTED[framework.name]}", "note")
    return Finding(title, value)


def _check_keras(facts: Facts) -> Finding:
    if facts.keras is None:
        wanted = any(f.name == "tensorflow" and f.version for f in facts.frameworks)
        return Finding("Keras", "not installed", "note", "pip install keras" if wanted else "")
    return Finding("Keras", facts.keras)


def _check_horovod(facts: Facts) -> list[Finding]:
    present = [framework for framework in facts.frameworks if framework.version is not None]
    if not present:
        remedy = "pip install 'hvd-ext[torch]' (or [tensorflow]), then " + REBUILD
        return [Finding("Horovod", "no framework to use it with", "problem", remedy)]
    if facts.horovod is None:
        return [Finding("Horovod", "not installed", "problem", REBUILD)]
    rows = [Finding("Horovod", facts.horovod)]
    insecure = SECURED.intersection(facts.unpatched)
    if (facts.horovod == HOROVOD and insecure) or _is_older(facts.horovod):
        value = (f"{facts.horovod}, without the security fixes of this hvd-ext: anyone who reaches its ports "
                 f"can run code ({', '.join(ADVISORIES)}; SECURITY.md)")
        rows = [Finding("Horovod", value, "problem", REBUILD)]
    elif facts.horovod != HOROVOD:
        value = f"{facts.horovod}; tested with {HOROVOD}"
        rows = [Finding("Horovod", value, "note", REBUILD)]
    elif facts.unpatched:
        value = f"{facts.horovod}, without the fixes of this hvd-ext (in {facts.unpatched[0]}, for one)"
        rows = [Finding("Horovod", value, "note", REBUILD)]
    rows += [_check_binding(framework, facts) for framework in present]
    if not usable_frameworks(facts) and all(row.level != "problem" for row in rows):
        rows.append(Finding("Horovod", "no installed framework can use it", "problem", REBUILD))
    return rows


def _is_older(version: str) -> bool:
    """Whether a Horovod is older than the one that the advisories still cover."""
    own, last = (re.findall(r"\d+", text)[:3] for text in (version, HOROVOD))
    return [int(part) for part in own] < [int(part) for part in last]


def _check_binding(framework: Framework, facts: Facts) -> Finding:
    """Whether Horovod's library for one framework is there, fits and loads."""
    subject = f"Horovod for {TITLES[framework.name]}"
    built = facts.built_for.get(framework.name)
    if built is None:
        # Left out on purpose (HOROVOD_WITHOUT_...) or installed later: only its user needs it.
        return Finding(subject, "not built", "note", REBUILD)
    if built != framework.version:
        value = f"built for {framework.name} {built}, installed is {framework.version}"
        return Finding(subject, value, "problem", REBUILD)
    if framework.horovod is None:
        reason = framework.horovod_error or framework.error or "unknown reason"
        value = f"built for {built}, does not load: {reason}"
        return Finding(subject, value, "problem", f"{REBUILD} --force")
    with_ = ", ".join(what.upper() for what, yes in framework.horovod.items() if yes) or "nothing"
    return Finding(subject, f"built for {built}, with {with_}")


def _built_with(facts: Facts, what: str) -> bool:
    return any(framework.horovod and framework.horovod.get(what) for framework in facts.frameworks)


def _check_mpi(facts: Facts) -> Finding:
    if not usable_frameworks(facts):
        return Finding("MPI", facts.mpirun_version or "none found", "note")
    if not _built_with(facts, "mpi"):
        return Finding("MPI", "Horovod is built without it; Gloo serves", "note", REBUILD)
    if facts.mpirun is None:
        remedy = "load the MPI that Horovod was built with, or " + REBUILD
        level: Level = "note" if _built_with(facts, "gloo") else "problem"
        return Finding("MPI", f"no mpirun; Horovod uses {facts.libmpi}", level, remedy)
    value = f"{facts.mpirun_version} ({facts.mpirun})"
    if facts.libmpi and not _same_tree(facts.mpirun, facts.libmpi):
        remedy = f"put the bin folder of {Path(facts.libmpi).parent} first on the PATH, or {REBUILD}"
        return Finding("MPI", f"{value}, but Horovod loads {facts.libmpi}", "note", remedy)
    return Finding("MPI", value)


def _same_tree(mpirun: str, libmpi: str) -> bool:
    """Whether launcher and library belong to one installation: PREFIX/bin beside PREFIX/lib*.

    A distribution's own MPI lies in /usr/lib/<machine>/..., with its launcher in /usr/bin.
    """
    prefix = Path(mpirun).resolve().parent.parent
    return Path(libmpi).resolve().is_relative_to(prefix)


def _check_launcher(facts: Facts) -> Finding:
    found = [path for path in (facts.mpirun, facts.horovodrun) if path]
    if facts.horovod is None:
        return Finding("Launcher", ", ".join(found) or "none", "note")
    if facts.horovodrun is None:
        return Finding("Launcher", "no horovodrun", "problem", f"{REBUILD} --force")
    if not facts.distutils:
        value = "horovodrun needs distutils, which this Python and setuptools lack"
        return Finding("Launcher", value, "problem", "pip install 'setuptools<81'")
    if open_mpi_major(facts.mpirun_version) >= 5:
        value = "horovodrun --gloo, mpirun (horovodrun --mpi does not know Open MPI 5)"
        return Finding("Launcher", value, "note")
    return Finding("Launcher", facts.horovodrun)


def _check_mpi4py(facts: Facts) -> Finding:
    if facts.mpi4py is None:
        value = "not installed; hvd_ext.async_ps needs it"
        return Finding("mpi4py", value, "note", "pip install 'hvd-ext[mpi]'")
    if "" not in (facts.libmpi, facts.mpi4py_libmpi) and facts.libmpi != facts.mpi4py_libmpi:
        value = f"{facts.mpi4py}, loads {facts.mpi4py_libmpi}, Horovod {facts.libmpi}"
        remedy = f"put {Path(facts.libmpi).parent} first in LD_LIBRARY_PATH, or " + REBUILD
        return Finding("mpi4py", value, "note", remedy)
    return Finding("mpi4py", facts.mpi4py)


def _check_kernels(facts: Facts) -> Finding:
    """How the loops of ``hvd_ext.kernels`` run here."""
    if facts.kernels not in kernels.CHOICES:
        return Finding("Kernels", f"{kernels.VARIABLE}={facts.kernels} is not known", "problem",
                       f"unset it, or one of {', '.join(kernels.CHOICES)}")
    if facts.kernels == "plain":
        return Finding("Kernels", f"PyTorch's and NumPy's operations, as {kernels.VARIABLE}=plain says")
    if facts.numba is None:
        return Finding("Kernels", "PyTorch's and NumPy's operations; Numba's are faster", "note",
                       "pip install 'hvd-ext[fast]'")
    if facts.numba_error:
        value = f"PyTorch's and NumPy's operations; Numba {facts.numba} does not import: {facts.numba_error}"
        return Finding("Kernels", value, "note", "pip install --upgrade numba")
    triton = "; Triton's for CUDA, not tested on a GPU" if facts.kernels == "triton" else ""
    return Finding("Kernels", f"compiled by Numba {facts.numba}{triton}")


def _check_cores(facts: Facts) -> Finding:
    return Finding("Cores", str(facts.cores))
