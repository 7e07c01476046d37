#!/usr/bin/env bash
# Everything to do where a GPU is at hand: the battery on CUDA, compute-sanitizer on the small cases, the benchmarks, the kernel ladder. Leaves JSON and logs in a folder.
#
#   benchmarks/device.sh --out FOLDER [--binary _C.so] [--python PYTHON] [--quick] [--dry-run]
#
# --binary   a built _C.so with CUDA kernels (it holds no Python, so any Python with torch >= 2.11 loads it). Without it one is built here: nvcc, cmake, ninja, g++.
# --python   an interpreter with a CUDA build of torch and numpy; default: python3. Nothing else is needed; _host is never imported.
# --quick    small sizes in the benchmarks
# --dry-run  print every command, run none
# A step that fails does not stop the others; the exit code is 1 if any failed, and FOLDER/steps.json says which and how long each took.
set -uo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
out="" binary="" python=python3 quick="" dry=""
while [ $# -gt 0 ]; do
  case $1 in
    --out | --binary | --python)
      [ $# -ge 2 ] || { echo "device.sh: $1 must be followed by a value" >&2; exit 2; }
      case $1 in --out) out=$2 ;; --binary) binary=$2 ;; --python) python=$2 ;; esac
      shift 2 ;;
    --quick) quick=--quick; shift ;;
    --dry-run) dry=1; shift ;;
    *) echo "device.sh: option must be --out, --binary, --python, --quick or --dry-run, got $1" >&2; exit 2 ;;
  esac
done
[ -n "$out" ] || { echo "device.sh: --out must name a folder" >&2; exit 2; }
if [ -n "$binary" ] && [ -z "$dry" ] && [ ! -f "$binary" ]; then
  echo "device.sh: --binary must be a file, got $binary" >&2
  exit 2
fi

failed=0 steps=""
step() {   # step NAME COMMAND...
  local name=$1 begin code
  shift
  if [ -n "$dry" ]; then
    printf '%s:' "$name"
    printf ' %q' "$@"
    printf '\n'
    return 0
  fi
  echo "== $name"
  begin=$SECONDS
  "$@" 2>&1 | tee "$out/$name.log"
  code=${PIPESTATUS[0]}
  [ "$code" -eq 0 ] || { failed=1; echo "== $name failed with code $code" >&2; }
  steps="$steps${steps:+, }{\"step\": \"$name\", \"code\": $code, \"seconds\": $((SECONDS - begin))}"
  return "$code"
}
finish() {
  [ -n "$dry" ] || printf '{"schema": "modalign.device_steps/1", "steps": [%s]}\n' "$steps" >"$out/steps.json"
  exit "$failed"
}

capability=90 torch_dir=TORCH
if [ -z "$dry" ]; then
  mkdir -p "$out" || exit 2
  out=$(cd "$out" && pwd)
  read -r capability torch_dir < <("$python" -c 'import os, torch
major, minor = torch.cuda.get_device_capability()
print(f"{major}{minor}", os.path.dirname(torch.__file__))') || { echo "device.sh: $python must have torch and see a GPU" >&2; exit 1; }
fi
case $capability in 90) target=90a ;; *) target=$capability ;; esac

# The package in a folder of its own, without any _host: the checkout may hold one for another Python.
stage=$root/build/device/stage
# shellcheck disable=SC2016  # the inner shell expands its own arguments
step stage bash -c 'rm -rf "$2" && mkdir -p "$2/modalign" && cd "$1/python/modalign" &&
  tar --exclude="*.so" --exclude=include --exclude=__pycache__ -cf - . | tar -xf - -C "$2/modalign"' _ "$root" "$stage" || finish
if [ -n "$binary" ]; then
  step binary cp "$binary" "$stage/modalign/_C.so" || finish
else
  step configure cmake -G Ninja -S "$root" -B "$root/build/device/cmake" -DMODALIGN_CUDA=ON "-DMODALIGN_CUDA_ARCHITECTURES=$target-real" -DMODALIGN_HOST=OFF \
    "-DMODALIGN_TORCH_DIR=$torch_dir" "-DCMAKE_INSTALL_PREFIX=$stage/modalign" || finish
  step build cmake --build "$root/build/device/cmake" || finish
  step install cmake --install "$root/build/device/cmake" || finish
fi
export PYTHONPATH=$stage

step battery "$python" "$root/benchmarks/device.py" battery --out "$out/battery.json"

sanitizer=$(command -v compute-sanitizer || echo "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer")
for tool in memcheck racecheck synccheck; do
  # Our kernels alone, and every tensor an allocation of its own, so that one past the end is past an allocation.
  step "sanitizer_$tool" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool "$tool" --kernel-regex kns=modalign_kernel --error-exitcode 9 \
    "$python" "$root/benchmarks/device.py" battery --small
done

ladder=$root/build/device/ladder
if step ladder_build nvcc -std=c++20 -O3 "-arch=sm_$target" -I "$root/csrc" "$root/benchmarks/ladder_gram_volume/ladder.cu" -o "$ladder"; then
  for tool in memcheck racecheck synccheck; do
    step "ladder_$tool" "$sanitizer" --tool "$tool" --error-exitcode 9 "$ladder" 130 67 40 3 1
  done
  # shellcheck disable=SC2016
  step ladder bash -c '"$1" 2048 2048 512 2 15 >"$2.part" && mv "$2.part" "$2" && cat "$2"' _ "$ladder" "$out/ladder_gram_volume_cuda.json"
fi

step bench_gram_volume "$python" "$root/benchmarks/device.py" bench gram_volume --out "$out/gram_volume_cuda.json" ${quick:+$quick}
finish
