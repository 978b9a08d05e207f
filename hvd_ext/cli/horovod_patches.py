"""What is changed in Horovod's released source: each edit with its reason, for one exact file each.

Those that are marked with a pull request's number do what Horovod's developers merged after the
release and never published; the others are this project's.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Patch:
    """Replacements in one file.

    Args:
        path: the file, relative to the source folder.
        before: SHA-256 of the file as released.
        after: SHA-256 of the file as edited.
        replacements: pairs (old, new).
        why: the reason, for the log.
        times: how often each ``old`` occurs.
    """

    path: str
    before: str
    after: str
    replacements: tuple[tuple[str, str], ...]
    why: str
    times: int = 1


_PROJECT = """project(horovod CXX)

if(DEFINED ENV{HVD_EXT_RPATH})
    # Libraries that lie in the Python environment are looked for relative to this library, so that
    # the wheel works in any environment.
    set(CMAKE_BUILD_WITH_INSTALL_RPATH ON)
    set(CMAKE_INSTALL_RPATH "$ENV{HVD_EXT_RPATH}")
    set(CMAKE_INSTALL_RPATH_USE_LINK_PATH "$ENV{HVD_EXT_RPATH_USE_LINK_PATH}")
endif()
"""

_WRITTEN = """create_metadata()
if(DEFINED ENV{HVD_EXT_EDITS})
    file(APPEND "${CMAKE_LIBRARY_OUTPUT_DIRECTORY_ROOT}/metadata.json"
         "\\"hvd_ext_edits\\": \\"$ENV{HVD_EXT_EDITS}\\",\\n")
endif()
"""

# CUDA is looked for where somebody asked for it. HOROVOD_GPU=CUDA alone builds what copies tensors
# of a GPU through the CPU.
_ASKED = """# CUDA and ROCM
set(HVD_EXT_GPU FALSE)
foreach(VAR IN ITEMS HOROVOD_GPU HOROVOD_GPU_ALLREDUCE HOROVOD_GPU_ALLGATHER HOROVOD_GPU_BROADCAST
        HOROVOD_GPU_ALLTOALL HOROVOD_GPU_REDUCESCATTER)
    if(DEFINED ${VAR})
        set(HVD_EXT_GPU TRUE)
    endif()
endforeach()
set(HVD_EXT_CUDA ${HVD_EXT_GPU})
if("$ENV{HOROVOD_WITH_MXNET}" STREQUAL "1" OR "$ENV{HOROVOD_WITH_NVTX}" STREQUAL "1")
    set(HVD_EXT_CUDA TRUE)
endif()
"""
_ENABLED = """    enable_language(CUDA)
    if(HVD_EXT_GPU)
        file(APPEND "${CMAKE_LIBRARY_OUTPUT_DIRECTORY_ROOT}/metadata.json"
             "\\"hvd_ext_cuda\\": \\"${CMAKE_CUDA_COMPILER_VERSION}\\",\\n")
    endif()
endif()
endif()
"""
_O3 = """string(REPLACE "-O2" "-O3" CMAKE_CUDA_FLAGS_RELWITHDEBINFO "${CMAKE_CUDA_FLAGS_RELWITHDEBINFO}")
"""
_NO_DEBUG = """string(REPLACE "-g " "" CMAKE_C_FLAGS_RELWITHDEBINFO "${CMAKE_C_FLAGS_RELWITHDEBINFO} ")
string(REPLACE "-g " "" CMAKE_CXX_FLAGS_RELWITHDEBINFO "${CMAKE_CXX_FLAGS_RELWITHDEBINFO} ")
"""
_TORCH_CUDA = """string(TOUPPER "${Pytorch_CUDA}" Pytorch_CUDA)
"""
_TORCH_CPU = """if(NOT HVD_EXT_GPU)
    # CPU operations need nothing of CUDA, whatever torch was built with.
    set(Pytorch_CUDA FALSE)
endif()
"""
_UNITY = """set_target_properties(${%s} PROPERTIES UNITY_BUILD ON UNITY_BUILD_BATCH_SIZE %d)
"""
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
_SCALE = (
    ("grad.values / horovod_size,", "grad.values / tf.cast(horovod_size, grad.values.dtype),"),
    ("grad /= horovod_size\n", "grad /= tf.cast(horovod_size, grad.dtype)\n"),
)

# A queue of tensors that has been finalized takes no more, and frees what was in it when no lock is held.
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

EDITS = (
    Patch(
        path="CMakeLists.txt",
        before="bd359fa17a149c61030e3b64cedd6c7237ddccd1b4f20acc900adda013e60a9a",
        after="f4acce5f9d3dd8a65b44eed216092ac5cf1b01c779f8fd3ff4935b035f2665c7",
        replacements=(
            ("set(CMAKE_CXX_STANDARD 14)", "set(CMAKE_CXX_STANDARD 20)"),
            ("project(horovod CXX)\n", _PROJECT),
            ("create_metadata()\n", _WRITTEN),
            (_O3, _O3 + _NO_DEBUG),
            ("# CUDA and ROCM\n", _ASKED),
            ("include(CheckLanguage)\n", "include(CheckLanguage)\nif(HVD_EXT_CUDA)\n"),
            ("    enable_language(CUDA)\nendif()\n", _ENABLED),
        ),
        why="C++20 headers of the frameworks; relative run path; CUDA only where asked for; "
        "no debug information",
    ),
    Patch(
        path="cmake/Modules/FindPytorch.cmake",
        before="b49214ef855d937228173e7af0074e36e9230344234fd03c828e4f8ee70b7837",
        after="1f8da64b1c5d075d1a37bee67f783f3b82a7c1bb0206d901f8cab8f7bd376da7",
        replacements=((_TORCH_CUDA, _TORCH_CUDA + _TORCH_CPU),),
        why="torch's CUDA build without a CUDA toolkit",
    ),
    Patch(
        path="horovod/torch/CMakeLists.txt",
        before="5e5ba9ee3e32ef26b58f0e2af1236098c674b39a8d5825b32942a3173dead6fc",
        after="49885a8b1058bd87edef01612e6570de43321423f5138367b74b490afbacc66a",
        replacements=(
            ("set(CMAKE_CXX_STANDARD 14)", "set(CMAKE_CXX_STANDARD 20)"),
            (
                "from distutils.sysconfig import get_python_inc; print(get_python_inc())",
                "import sysconfig; print(sysconfig.get_path('include'))",
            ),
            (
                "add_library(${PYTORCH_TARGET_LIB} SHARED ${SOURCES} ${PYTORCH_SOURCES})\n",
                # make begins with the last batch, which has the framework's own files and takes longest.
                "add_library(${PYTORCH_TARGET_LIB} SHARED ${SOURCES} ${PYTORCH_SOURCES})\n"
                + _UNITY % ("PYTORCH_TARGET_LIB", 8),
            ),
        ),
        why="torch's headers are C++20; Python 3.12 has no distutils; several files a compiler run",
    ),
    Patch(
        path="horovod/tensorflow/CMakeLists.txt",
        before="fb7c462dec28a4555584275e7471d62d57ed7867db9423c9b7279836cf6d5c25",
        after="fa822f06206113c726838f6b1f3cdc4f849ad952d4d5d461eca9ee21c7521e89",
        replacements=(
            ("set(CMAKE_CXX_STANDARD 17)", "set(CMAKE_CXX_STANDARD 20)"),
            # Gloo's second copy differs only in the standard it is compiled for; PyTorch's library
            # links the first one under C++20 as well.
            ("set(Tensorflow_CXX17 TRUE)", "set(Tensorflow_CXX17 FALSE)"),
            (
                'list(APPEND TF_SOURCES "${PROJECT_SOURCE_DIR}/horovod/tensorflow/'
                'xla_mpi_ops.cc")\n',
                "",
            ),
            (
                "add_library(${TF_TARGET_LIB} SHARED ${SOURCES} ${TF_SOURCES})\n",
                "add_library(${TF_TARGET_LIB} SHARED ${SOURCES} ${TF_SOURCES})\n"
                + _UNITY % ("TF_TARGET_LIB", 8),
            ),
        ),
        why="TensorFlow's headers are C++20; its wheel lacks the XLA headers of the opt-in XLA ops; "
        "one Gloo; several files a compiler run",
    ),
    Patch(
        path="horovod/common/ops/cuda/CMakeLists.txt",
        before="b2dfbc672deaafeda6eec71742edd0fb3651e225b8d959248774ab06b0ff9386",
        after="ced3f0721ff2574ed53a2cf2fbf23e334d9750ce3cd8b9617bb715ea321e23fc",
        replacements=(
            (
                "add_library(compatible_horovod_cuda_kernels ",
                "add_library(compatible_horovod_cuda_kernels EXCLUDE_FROM_ALL ",
            ),
        ),
        why="kernels for the old C++ ABI only where they are linked",
    ),
    Patch(
        path="horovod/common/common.h",
        before="3967c6a5c465cc1392adb11b0d7193a96963060ed9496023b4b7fbca8b4600f3",
        after="06ea0570cb911ea5e0c7c78bf4dad7a5b5298fac41c0bf0f240167c924b10c66",
        replacements=(("#include <memory>\n", "#include <memory>\n#include <stdexcept>\n"),),
        why="gcc 13 (#3957)",
    ),
    Patch(
        path="horovod/common/group_table.h",
        before="ba97a00f767d597c2250c114173f988f34bd08a708a7cefc4d1f6586824dedac",
        after="2c71ba8755b18da8179f8188d782bb29da9bed44cae6d4b09e0b1977c1723c6b",
        replacements=(("#include <queue>\n", "#include <queue>\n#include <string>\n"),),
        why="gcc 13 (#3957)",
    ),
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
        after="a6bf8be4b713ef8acf9a8624b277df7b1a054c0cc20524086e3e81bf123f374b",
        replacements=(
            ("elif 'MPICH' in output:", "elif 'MPICH' in output or 'HYDRA' in output:"),
            ("    nccl_socket_intf_arg =", _ONE_INTERFACE),
        ),
        why="newer MPICH says HYDRA (#3984); its network interface (#3946)",
    ),
    Patch(
        path="horovod/runner/js_run.py",
        before="0b412fbe06f56a687a1286fe3141f962b3934ba851512c047789cc7a7d7d5d18",
        after="d5e6c0bb1333942e5886a5e1200c8e2b1c830ced2f1ff25456dde18d99fa28cd",
        replacements=(
            (
                "from distutils.spawn import find_executable\n",
                "from shutil import which as find_executable\n",
            ),
        ),
        why="Python 3.12 has no distutils",
    ),
)
