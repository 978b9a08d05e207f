"""What the facts about GPUs mean: driver, CUDA of each part, and how tensors on a GPU are reduced."""

from hvd_ext.cli.cuda import parse_version
from hvd_ext.cli.environment import Facts, Framework
from hvd_ext.cli.finding import REBUILD, Finding, Level

_NAMES = {"torch": "PyTorch", "tensorflow": "TensorFlow"}


def gpu_findings(facts: Facts) -> list[Finding]:
    """The rows about GPUs; one row that says so where nothing here has to do with one."""
    built = [framework for framework in facts.frameworks if framework.cuda]
    if not facts.gpu and not built and not _built_with(facts, "cuda"):
        return [Finding("GPU", "none here, and no framework that would use one")]
    rows = [_check_driver(facts, built)]
    if built:
        rows.append(_check_cuda(facts, built))
    return [*rows, _check_operations(facts, built)]


def _check_driver(facts: Facts, built: list[Framework]) -> Finding:
    """Whether the driver is new enough for what the frameworks were built with."""
    if facts.driver is None:
        return Finding("GPU", "none visible: no NVIDIA driver answers")
    value = f"driver {facts.driver.version}, for CUDA up to {facts.driver.cuda}"
    for framework in built:
        have, need = parse_version(facts.driver.cuda), parse_version(framework.cuda or "")
        name = _NAMES[framework.name]
        if have[0] < need[0]:
            remedy = (f"a newer driver (the administrator's), or a {framework.name} built with CUDA "
                      f"{facts.driver.cuda} or older")
            value = f"{value}; {name} needs CUDA {framework.cuda}"
            return Finding("GPU", value, "problem", remedy)
        if have < need:
            value = f"{value}; {name} has {framework.cuda}, of which the driver runs what is compiled already"
            return Finding("GPU", value, "note", "a newer driver where a kernel is reported as missing")
    return Finding("GPU", value)


def _check_cuda(facts: Facts, built: list[Framework]) -> Finding:
    """The CUDA releases side by side."""
    parts = [f"{_NAMES[framework.name]} {framework.cuda}" for framework in built]
    if facts.horovod_cuda:
        parts.append(f"Horovod {facts.horovod_cuda}")
    if facts.toolkit is not None:
        parts.append(f"toolkit of this machine {facts.toolkit.release}")
    value = ", ".join(parts)
    for framework in built:
        if facts.horovod_cuda and parse_version(facts.horovod_cuda)[0] != parse_version(framework.cuda
                                                                                        or "")[0]:
            return Finding("CUDA", value, "problem", f"{REBUILD} --gpu --force")
    return Finding("CUDA", value)


def _check_operations(facts: Facts, built: list[Framework]) -> Finding:
    """How a tensor on a GPU is reduced."""
    compiled = _built_with(facts, "nccl")
    if compiled:
        # 22907 is 2.29.7; before 2.9 the digits were fewer.
        version = f"{compiled // 10000}.{compiled // 100 % 100}.{compiled % 100}"
        value = f"NCCL, compiled for {version}"
        for framework in built:
            if framework.nccl and framework.nccl != version:
                value += f"; two NCCLs: {_NAMES[framework.name]} loads {framework.nccl}"
                level: Level = "note" if _is_newer(framework.nccl, version) else "problem"
                remedy = f"{REBUILD} --gpu --force, without HOROVOD_NCCL_HOME"
                return Finding("GPU operations", value, level, remedy)
        return Finding("GPU operations", value)
    if _built_with(facts, "cuda") or _built_with(facts, "rocm"):
        value = "gradients of a GPU travel through the CPU"
        return Finding("GPU operations", value, "note", f"{REBUILD} --gpu")
    told = {"torch": "Horovod refuses PyTorch's tensors on a GPU",
            "tensorflow": "TensorFlow copies its tensors to the CPU and back"}
    names = [framework.name for framework in built if framework.horovod is not None]
    value = "; ".join(["not built in", *(told[name] for name in names)])
    here = facts.gpu or any(framework.gpus for framework in built)
    return Finding("GPU operations", value, "note" if here else "ok", f"{REBUILD} --gpu")


def _is_newer(one: str, other: str) -> bool:
    return [int(part) for part in one.split(".")] > [int(part) for part in other.split(".")]


def _built_with(facts: Facts, what: str) -> int:
    return max((framework.horovod or {}).get(what, 0) for framework in facts.frameworks)
