#!/usr/bin/env bash
# Everything that only a GPU can tell about this tree, in one call. Needs torch, Triton and pytest; where vLLM for
# CUDA is installed too, engine tests run as well. Logs go to $OUT (default: gpu_check_out).
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-gpu_check_out}
mkdir -p "$OUT"
export PYTHONPATH="$PWD/kernels:$PWD/benchmarks/quality:$PWD${PYTHONPATH:+:$PYTHONPATH}"
status=0

run() {
  local name=$1
  shift
  echo "== $name"
  python3 -m pytest -q -p no:cacheprovider "$@" 2>&1 | tee "$OUT/$name.log" | tail -n 15
  [ "${PIPESTATUS[0]}" -eq 0 ] || status=1
}

python3 -c 'import torch; assert torch.cuda.is_available(), "no GPU"; print(torch.cuda.get_device_name())' || exit 1
# Compiled kernels against their references; policies that may not wait for the device.
run kernels tests/kernels -m "not slow"
run policies tests/policies
if python3 -c 'import vllm' 2>/dev/null; then
  # vLLM schedules asynchronously on a GPU; counting concurrency needs stock vLLM's CPU block size.
  run engine tests/engine/test_budget_one.py tests/engine/test_budget_quarter.py tests/engine/test_recall.py \
    -k "not [sync] and not at_once and not two_ranks"
  run host_tier tests/worker
  run calibrate tests/quality/test_calibrate.py tests/quality/test_watch_heads.py
  # The link to the host: gather and offload against pinned copies, and how much of an offload is hidden.
  echo "== benchmarks/host_tier.py"
  python3 benchmarks/host_tier.py 2>&1 | tee "$OUT/host_tier_benchmark.log" | tail -n 20
  [ "${PIPESTATUS[0]}" -eq 0 ] || status=1
  cp benchmarks/results/host_tier.json "$OUT/" 2>/dev/null
  # Every decode kernel against the card's bandwidth and other libraries; files appear as it goes on.
  echo "== benchmarks/kernels.py"
  python3 benchmarks/kernels.py --batch 32 --skew 16 --tier gpu,host --out "$OUT/kernels" 2>&1 | tee "$OUT/kernels_benchmark.log" | tail -n 60
  [ "${PIPESTATUS[0]}" -eq 0 ] || status=1
fi
exit $status
