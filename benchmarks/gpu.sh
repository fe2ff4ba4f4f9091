#!/usr/bin/env bash
# Everything that needs a GPU, in one call of at most eight minutes; nothing is downloaded or installed.
#
#     bash benchmarks/gpu.sh OUTDIR          # writes OUTDIR/gpu-CARD.json, gpu-CARD.md and gpu.log
#     TINY=1 bash benchmarks/gpu.sh OUTDIR   # does it run? small sizes, on the processor if there is no GPU
#     PARTS="tokens sweep" bash benchmarks/gpu.sh OUTDIR
#
# Each part has a time limit of its own. One that fails or is stopped leaves what it has measured and does not stop the
# others; TOTAL seconds (480) are shared in the order of the list. PYTHON names the interpreter, COMMIT the version where git cannot.
set -uo pipefail

out=${1:?usage: bash benchmarks/gpu.sh OUTDIR}
total=${TOTAL:-${TINY:+3600}}
total=${total:-480}
python=${PYTHON:-python3}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
mkdir -p "$out"
out=$(cd "$out" && pwd)

# part:seconds, in the order of what matters
limits=(correctness:85 prefill-llava:95 prefill-llava-next:70 first-token:60 host:80 tokens:60 sweep:45 originals:75
    reducers:40 onnx:60)

export PYTHONPATH=$root PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$(mktemp -d)}  # shared by the parts, empty at first
cd "$root" || exit 1
SECONDS=0
{
    "$python" -c 'import sys, torch; print(sys.version.split()[0], "torch", torch.__version__, torch.cuda.is_available())'
    nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm --format=csv,noheader 2>/dev/null
    for entry in "${limits[@]}"; do
        part=${entry%:*} seconds=${TINY:+6}${entry#*:}  # a processor needs longer
        if [[ -n ${PARTS:-} && " $PARTS " != *" $part "* ]]; then continue; fi
        left=$((total - SECONDS - 5))
        if ((left < 20)); then echo "=== $part: left out, $left s are left"; continue; fi
        if ((seconds > left)); then seconds=$left; fi
        echo "=== $part: at most $seconds s, at $SECONDS s"
        timeout --kill-after=8 "$seconds" "$python" benchmarks/gpu/run.py "$part" --out "$out" --seconds "$seconds" \
            ${TINY:+--tiny --rounds 2}
        echo "=== $part: exit code $? at $SECONDS s"
    done
} 2>&1 | tee "$out/gpu.log"
cat "$out"/gpu-*.md
