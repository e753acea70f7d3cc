#!/usr/bin/env bash
# Run the GPU check where pack.sh's .gpu/ has been brought to, in the root of that checkout:
#
#   bash .gpu/on_device.sh [--budget S] [--dry] [STEP...]
#
# The packages are unpacked once into SITE (default: ~/.tandemrec-gpu), beside those that are there already.
# Results, logs and the page go to OUT (default: runs/gpu; runs/gpu-dry with --dry), what steps share to WORK
# (default: OUT-work).
# PYTHON names the interpreter.
set -uo pipefail
gpu=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
case " $* " in *" --dry "*) default=runs/gpu-dry ;; *) default=runs/gpu ;; esac
SITE=${SITE:-$HOME/.tandemrec-gpu} OUT=${OUT:-$default} PYTHON=${PYTHON:-python3}
began=$(date +%s)
mkdir -p "$OUT"

unpack() {
  local archive waits=()
  rm -rf "$SITE"
  mkdir -p "$SITE"
  for archive in "$gpu"/*.tar.xz; do
    # By Python, since there may be no xz.
    "$PYTHON" -c 'import sys, tarfile; tarfile.open(sys.argv[1], "r:xz").extractall(sys.argv[2], filter="data")' \
      "$archive" "$SITE" &
    waits+=($!)
  done
  for archive in "$gpu"/wheels/*.whl; do
    "$PYTHON" -m zipfile -e "$archive" "$SITE" || return 1
  done
  local one
  for one in "${waits[@]}"; do wait "$one" || return 1; done
  touch "$SITE/.unpacked"
}
# What was packed anew since replaces what is there.
if [ ! -f "$SITE/.unpacked" ] || [ -n "$(find "$gpu" -newer "$SITE/.unpacked" -print -quit)" ]; then
  unpack || { echo "unpacking into $SITE failed" >&2; exit 3; }
fi
export PYTHONPATH=$SITE:$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1

# fbgemm is linked to the driver's libnvidia-ml.so.1, which may be where the loader does not look.
if ! ldconfig -p 2> /dev/null | grep -q libnvidia-ml.so.1; then
  for folder in /usr/local/nvidia/lib64 /usr/local/nvidia/lib /usr/lib64-nvidia /usr/lib/wsl/lib; do
    if [ -e "$folder/libnvidia-ml.so.1" ]; then
      export LD_LIBRARY_PATH=$folder${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
      break
    fi
  done
fi
echo "unpacked after $(($(date +%s) - began)) s"
words=(--out "$OUT" ${WORK:+--work "$WORK"})
[ -d "$gpu/log" ] && words+=(--log "$gpu/log")
[ -d .gpu-log ] && words+=(--log .gpu-log)
"$PYTHON" -m benchmarks.gpu "${words[@]}" "$@"
code=$?
[ $code -eq 2 ] || "$PYTHON" -m benchmarks.gpu report "$OUT" --to "$OUT"
exit $code
