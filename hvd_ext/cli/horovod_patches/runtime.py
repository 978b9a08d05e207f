"""Edits of what Horovod does while it runs and launches ranks, without its security."""

from hvd_ext.cli.horovod_patches.kinds import Patch

_CONTIGUOUS = """    if not tensor.is_contiguous():
"""
_REFUSE = """    if tensor.is_cuda and not (_basics.cuda_built() or _basics.rocm_built()):
        raise ValueError('This Horovod has CPU operations only and got a tensor on %s: build it with '
                         '"hvd-ext install-horovod --gpu", or move the tensor to the CPU.' % tensor.device)
"""
_ONE_INTERFACE = """    if settings.nics and impi_or_mpich:
        if len(nics) > 1:
            raise Exception('MPICH and Intel MPI take one network interface, got: ' + ', '.join(sorted(nics)))
        tcp_intf_arg = '-iface ' + next(iter(nics))
    nccl_socket_intf_arg ="""
_KEY_BY_NAME = """    if settings.run_func_mode and secret.HOROVOD_SECRET_KEY in env and not impi_or_mpich:
        # By its name: no command line contains the key.
        env_list += ' -x ' + secret.HOROVOD_SECRET_KEY

    # Pass all the env variables to the mpirun command.
"""
_SCALE = (
    ("grad.values / horovod_size,", "grad.values / tf.cast(horovod_size, grad.values.dtype),"),
    ("grad /= horovod_size\n", "grad /= tf.cast(horovod_size, grad.dtype)\n"),
)

_ADD_ONE = """  std::lock_guard<std::mutex> guard(mutex_);
  if (tensor_table_.find(e.tensor_name) != tensor_table_.end()) {
"""
_ADD_SEVERAL = """  std::lock_guard<std::mutex> guard(mutex_);

  for (std::size_t i = 0; i < entries.size(); ++i) {
    if"""
_CLOSED = """  if (!closed_.ok()) {
    return closed_;
  }
"""
_FINALIZE = """  std::lock_guard<std::mutex> guard(mutex_);
  for (auto& e : tensor_table_) {
    e.second.FinishWithCallback(status);
  }
  tensor_table_.clear();
  while (!message_queue_.empty()) {
    message_queue_.pop();
  }
}
"""
_FINALIZE_UNLOCKED = """\
  // To free a tensor of PyTorch's this thread needs the interpreter's lock. Another thread may have it
  // and wait, in a call that submits a tensor, for a lock that is held here. So the tensors are freed
  // when this thread of Horovod's ends, which holds no lock then.
  static thread_local std::vector<std::unordered_map<std::string, TensorTableEntry>> finalized;
  finalized.emplace_back();
  auto& table = finalized.back();
  {
    std::lock_guard<std::mutex> guard(mutex_);
    closed_ = status;
    table.swap(tensor_table_);
    while (!message_queue_.empty()) {
      message_queue_.pop();
    }
  }
  for (auto& e : table) {
    e.second.FinishWithCallback(status);
  }
}

void TensorQueue::Reopen() {
  std::lock_guard<std::mutex> guard(mutex_);
  closed_ = Status::OK();
}
"""
_REMOVE_JOIN = """  // Lock on the tensor table.
  std::lock_guard<std::mutex> guard(mutex_);
  auto iter = tensor_table_.find(JOIN_TENSOR_NAME);
  assert(iter != tensor_table_.end());
  auto& e = iter->second;
  e.FinishWithCallback(Status::OK());
  tensor_table_.erase(iter);
}
"""
_REMOVE_JOIN_UNLOCKED = """\
  TensorTableEntry e;  // freed after the lock is given back, see FinalizeTensorQueue
  {
    std::lock_guard<std::mutex> guard(mutex_);
    auto iter = tensor_table_.find(JOIN_TENSOR_NAME);
    assert(iter != tensor_table_.end());
    e = std::move(iter->second);
    tensor_table_.erase(iter);
  }
  e.FinishWithCallback(Status::OK());
}
"""
_REOPEN = """  void FinalizeTensorQueue(const Status& status);

  // For a process set that is initialized again.
  void Reopen();
"""
_CLOSED_MEMBER = """  mutable std::mutex mutex_;

  // The error that the queue was finalized with: what is added after it would be waited for without end.
  Status closed_ = Status::OK();
"""

RUNTIME_EDITS = (
    Patch(
        path="horovod/common/tensor_queue.h",
        before="d72df22f16d53983e7af70a5650bebbf271f020744f08bd38a2ad9a7e7e4e366",
        after="ecd8aeceb6b5f60bf4d4d5fbe974f1469712d82cf1926676567880c7a2438284",
        replacements=(
            ("  void FinalizeTensorQueue(const Status& status);\n", _REOPEN),
            ("  mutable std::mutex mutex_;\n", _CLOSED_MEMBER),
        ),
        why="a shutdown ends every collective, without a deadlock",
    ),
    Patch(
        path="horovod/common/tensor_queue.cc",
        before="da59b96d10291ec14f46f46fed81bfebf7e8f9c3a4817102c2b745a6a0e31fd0",
        after="67daa2625344603b7a4c9a9ca6977f3659ff3f3f2386a924e34c699af4d387e3",
        replacements=(
            ("#include <assert.h>\n", "#include <assert.h>\n\n#include <unordered_map>\n#include <vector>\n"),
            (_ADD_ONE, _ADD_ONE.replace("  if", _CLOSED + "  if", 1)),
            (_ADD_SEVERAL, _ADD_SEVERAL.replace("\n\n", "\n" + _CLOSED + "\n", 1)),
            (_FINALIZE, _FINALIZE_UNLOCKED),
            (_REMOVE_JOIN, _REMOVE_JOIN_UNLOCKED),
        ),
        why="a shutdown ends every collective, without a deadlock",
    ),
    Patch(
        path="horovod/common/process_set.cc",
        before="e7a4a68a4b96f5f336042b10fcca4c12ab576b74100f436964a2c429ffeebdfa",
        after="a0ff938ef0384c336f959a571d2ded8c9b33ea4739015deb2373955c4297603e",
        replacements=(("  initialization_done = true;\n",
                       "  tensor_queue.Reopen();\n  initialization_done = true;\n"),),
        times=2,
        why="a shutdown ends every collective, without a deadlock",
    ),
    Patch(
        path="horovod/torch/mpi_ops.py",
        before="66447db8b08596217bab2f5d2e5b74badf77fd59031c4529687bfd9120bc215c",
        after="5ae21f9db85684e8c5422d0c85e816aa7de8d1e79a1d6e611e2207b8c8d89103",
        replacements=((_CONTIGUOUS, _REFUSE + _CONTIGUOUS),),
        why="a tensor on a GPU, given to CPU operations, would end the process",
    ),
    Patch(
        path="horovod/tensorflow/__init__.py",
        before="000bbcaab328571cd5b613bced7aa8c2d6ede6704db78c43abb45bc8c7f57231",
        after="0650a8ac5f643ad17feaf34a5959d54add35441d6d66c8e15f5d7df37c462dec",
        replacements=_SCALE,
        times=4,
        why="local gradients keep their dtype (#3985)",
    ),
    Patch(
        path="horovod/_keras/__init__.py",
        before="f484b20e4625c6d2bfbdff737cf81413e17ac1096203a6617dcc7b01c43a29b6",
        after="354251dda93aaeafe2f193823fbf2ac98e3bbd8e821f186d440a9143990b91f1",
        replacements=_SCALE,
        times=2,
        why="local gradients keep their dtype (#3985)",
    ),
    Patch(
        path="horovod/runner/mpi_run.py",
        before="ab2098e76d3bea27e55ee49f47e583542121479a5aa31abc43f1e19cdab78c5a",
        after="4a394f57f3afd54ce125ad5e8080b2c37a4bb1116e175e7f7a32fa308ba7772c",
        replacements=(
            ("elif 'MPICH' in output:", "elif 'MPICH' in output or 'HYDRA' in output:"),
            ("    nccl_socket_intf_arg =", _ONE_INTERFACE),
            ("import env as env_util, hosts, safe_shell_exec, tiny_shell_exec",
             "import env as env_util, hosts, safe_shell_exec, secret, tiny_shell_exec"),
            ("    # Pass all the env variables to the mpirun command.\n", _KEY_BY_NAME),
        ),
        why="newer MPICH says HYDRA (#3984); its network interface (#3946); ranks get the job's key",
    ),
    Patch(
        path="horovod/runner/js_run.py",
        before="0b412fbe06f56a687a1286fe3141f962b3934ba851512c047789cc7a7d7d5d18",
        after="02a8711fa21380e1dc1fc8f6bbe4fe8926f1ace7777e5e535c33e724a0384979",
        replacements=(
            (
                "from distutils.spawn import find_executable\n",
                "from shutil import which as find_executable\n",
            ),
            ("mpi_impl_flags, _ = _get", "mpi_impl_flags, _, _ = _get"),
        ),
        why="Python 3.12 has no distutils; a function that returns three values",
    ),
)
