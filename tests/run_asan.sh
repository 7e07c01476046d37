#!/bin/sh
# Builds `_host` (emulator, device code as host C++, CPU tile engine) with AddressSanitizer and runs its tests on that build.
#   tests/run_asan.sh [pytest arguments]        default: the tests that need nothing but `_host`
#   BUILD=folder   where to build (default: build/asan)
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
BUILD=${BUILD:-build/asan}
flags="-O1 -g1 -fno-omit-frame-pointer -fsanitize=address -Wno-maybe-uninitialized"   # the warning misreads instrumented pybind11 headers

cmake -G Ninja -S . -B "$BUILD" -DCMAKE_BUILD_TYPE=None -DMODALIGN_CUDA=OFF -DMODALIGN_SANITIZE=address -DCMAKE_CXX_FLAGS="$flags" -DPython_EXECUTABLE="$(command -v "$PYTHON")" \
    -Dpybind11_DIR="$("$PYTHON" -m pybind11 --cmakedir)" -DMODALIGN_TORCH_DIR="$("$PYTHON" -c 'import os, torch; print(os.path.dirname(torch.__file__))')" >/dev/null
cmake --build "$BUILD" --target _host

if [ $# -eq 0 ]; then set -- -q tests/test_emulator.py tests/test_kernels_host.py tests/test_tile_cpu.py; fi
# Python is not instrumented: the sanitizer's runtime must come before it, with the C++ library whose `throw` it watches. What Python leaks at exit is not ours;
# and _C.so brings its own `new` (static C++ library), whose memory libtorch deletes: no mismatch, though it looks like one from outside.
export PYTHONPATH="$PWD/python${PYTHONPATH:+:$PYTHONPATH}"
export LD_PRELOAD="$("${CXX:-c++}" -print-file-name=libasan.so) $("${CXX:-c++}" -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0:alloc_dealloc_mismatch=0:abort_on_error=1
export MODALIGN_HOST_BUILD="$BUILD"
# The sanitizer writes to the file descriptor and stops the process: pytest must neither swallow the one nor report the other.
PYTHONPATH="$PWD/tests:$PYTHONPATH" exec "$PYTHON" -m pytest -p asan_host -p no:cacheprovider -p no:faulthandler --capture=sys "$@"
