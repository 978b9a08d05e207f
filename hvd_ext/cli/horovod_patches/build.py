"""Edits that let Horovod compile with today's compilers, CMake and framework headers."""

from hvd_ext.cli.horovod_patches.kinds import Patch

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

BUILD_EDITS = (
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
)
