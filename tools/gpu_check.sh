#!/usr/bin/env bash
# Everything that only a GPU can tell about this tree: `tools/gpu_check.sh [PART ...]`, by default all, each part
# within ten minutes on an H200.
#
#   kernels   compiled kernels and policies; needs torch, Triton, pytest and hypothesis only
#   engine    vLLM with the plugin: tests of engine, worker and calibration
#   speed     kernels against the card's limits and other libraries; the link to the host
#   tune      a step of a layer under other tunings of the kernels
#   full      stock vLLM and hybridkv in one process each, on random weights of MODEL's shape (a folder): how many
#             requests decode at once in a small cache
#   engines   the same: time a token at equal batch. Half of the heads recall, as a profile says; 32 x 32k needs an H200
#   pruned, pressure   whole servers, stock and hybridkv, with random weights of MODEL's shape
#
# MODEL: folder or name of Qwen2.5-VL-7B's configuration and tokenizer, with all of its layers. Logs and results go to $OUT (default:
# gpu_check_out); its folder `performance` goes to benchmarks/results/performance/CARD.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-gpu_check_out}
MODEL=${MODEL:-Qwen/Qwen2.5-VL-7B-Instruct}
mkdir -p "$OUT/performance"
export PYTHONPATH="$PWD/kernels:$PWD/benchmarks/quality:$PWD/benchmarks/serving:$PWD${PYTHONPATH:+:$PYTHONPATH}"
status=0

# Its name, how many lines of its end to show, and the command.
run() {
  local name=$1 lines=$2
  shift 2
  echo "== $name"
  "$@" 2>&1 | tee "$OUT/$name.log" | tail -n "$lines"
  [ "${PIPESTATUS[0]}" -eq 0 ] || status=1
}

tests() {
  local name=$1
  shift
  # Interrupted, pytest still says what has failed.
  run "$name" 40 timeout --signal INT 570 python3 -m pytest -q --tb=short -p no:cacheprovider "$@"
}

servers() {
  local name=$1
  shift
  run "$name" 60 python3 benchmarks/serve.py --model "$MODEL" --load-format dummy --prompt-tokens 32768 \
    --out "$OUT/performance/$name" "$@"
}

part() {
  case $1 in
    kernels)
      tests kernels tests/kernels -m "not slow"
      tests policies tests/policies/test_policy_device.py -k gpu
      ;;
    engine)
      # vLLM schedules asynchronously on a GPU; counting concurrency needs stock vLLM's CPU block size.
      tests engine tests/engine/test_budget_one.py tests/engine/test_budget_quarter.py \
        tests/engine/test_recall.py -k "not sync] and not at_once and not two_ranks"
      tests host_tier tests/worker
      tests calibrate tests/quality/test_calibrate.py tests/quality/test_watch_heads.py
      ;;
    speed)
      run host_tier_benchmark 20 python3 benchmarks/host_tier.py
      cp benchmarks/results/host_tier.json "$OUT/" 2>/dev/null
      # Files appear as it goes on.
      run kernels_benchmark 80 python3 benchmarks/kernels.py --batch 32 --skew 16 --tier gpu,host \
        --out "$OUT/performance"
      ;;
    tune)
      local tier
      for tier in gpu host; do
        run "tune_$tier" 40 python3 benchmarks/tune.py --tier "$tier" --out "$OUT/tune_$tier.json"
      done
      run tune_pruned 40 python3 benchmarks/tune.py --dynamic 0 --out "$OUT/tune_pruned.json"
      ;;
    engines)
      run engines 40 python3 benchmarks/engines.py --model "$MODEL" --load-format dummy --scenarios batch \
        --out "$OUT/performance"
      ;;
    full)
      run full 20 python3 benchmarks/engines.py --model "$MODEL" --load-format dummy --scenarios full \
        --dynamic-tiers off --out "$OUT/performance"
      ;;
    # One, and 32 answers at once: the first is not to end before the last prompt is computed.
    pruned)
      servers pruned --scenarios batch --clients 1,32 --prompts-in-memory 32 --dynamic-tier off --answer-tokens 1024
      ;;
    # Four times as many clients as stock has room for.
    pressure) servers pressure --scenarios images,chat --clients 4 --prompts-in-memory 4 --requests 48 ;;
    *)
      echo "gpu_check.sh: unknown part $1 (known: kernels engine speed tune full engines pruned pressure)" >&2
      exit 2
      ;;
  esac
}

[ $# -gt 0 ] || set -- kernels engine speed tune full engines pruned pressure
python3 -c 'import torch; assert torch.cuda.is_available(), "no GPU"; print(torch.cuda.get_device_name())' || exit 1
if ! python3 -c 'import vllm' 2>/dev/null; then
  echo "vLLM is not installed: kernels only"
  set -- kernels
fi
for name in "$@"; do part "$name"; done
exit $status
