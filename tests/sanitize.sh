#!/usr/bin/env bash
# Runs the cases marked `sanitize` on the GPU under each tool of compute-sanitizer.
#
#     tests/sanitize.sh LOGS [TOOL...]      tools: memcheck racecheck initcheck synccheck (default)
#
# PYTHON and COMPUTE_SANITIZER name other programs; SANITIZER_OPTIONS adds options, such as
# `--kernel-name kns=plan`. Each tool leaves TOOL.log (its report) and TOOL.txt (pytest's) in LOGS.
# Exits with 1 when a tool found something or a test failed.
set -u

if [ $# -lt 1 ]; then
    sed -n '2,8p' "$0"
    exit 2
fi
logs=$1
shift
tools=("$@")
[ ${#tools[@]} -gt 0 ] || tools=(memcheck racecheck initcheck synccheck)
python=${PYTHON:-python3}
sanitizer=${COMPUTE_SANITIZER:-compute-sanitizer}
tests=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$logs"

# The interpreter itself, not a wrapper: the tools watch the process that they start.
python=$("$python" -c 'import sys; print(sys.executable)') || exit 2
run=("$python" -m pytest -q -p no:cacheprovider -m "sanitize and gpu" -o timeout=900
     "$tests/test_sanitize.py")

# Triton compiles here, so that no tool runs while the compiler does.
if ! "${run[@]}" >"$logs/plain.txt" 2>&1 || ! grep -q ' passed' "$logs/plain.txt"; then
    tail -n 30 "$logs/plain.txt"
    echo "plain: FAILED without any tool"
    exit 1
fi

# Every tensor in an allocation of its own: what is out of bounds is outside of any.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
# The oracle computes on the CPU, for all tools at once.
export OMP_NUM_THREADS=2
check() {
    tool=$1 start=$SECONDS
    # A busy machine takes long to import torch, and the tool waits for the first use of CUDA.
    # shellcheck disable=SC2086
    "$sanitizer" --tool "$tool" --target-processes application-only --launch-timeout 300 \
        --error-exitcode 99 \
        --log-file "$logs/$tool.log" ${SANITIZER_OPTIONS:-} "${run[@]}" >"$logs/$tool.txt" 2>&1
    code=$?
    summary=$(grep -sE 'SUMMARY' "$logs/$tool.log" | tail -n 1)
    if [ $code -eq 0 ] && ! grep -qE ' passed' "$logs/$tool.txt"; then code=98; fi
    echo "$tool: exit $code in $((SECONDS - start)) s; $(tail -n 1 "$logs/$tool.txt"); $summary"
    return $code
}

# At once: each keeps a processor busy for minutes.
jobs=()
for tool in "${tools[@]}"; do
    check "$tool" &
    jobs+=($!)
done
failed=0
for job in "${jobs[@]}"; do
    wait "$job" || failed=1
done
exit $failed
