#!/usr/bin/env bash
# Pack the GPU check for a machine without network that takes only so many MiB: into .gpu/ of a checkout.
#
#   benchmarks/gpu/pack.sh [CHECKOUT] [LOG]
#
# CHECKOUT is this checkout unless named, with its environment in .venv/. LOG is a sequence log of Complete
# Journey for the step `demo`, such as runs/demo/log; where it has no room beside the rest, it goes to
# .gpu-log/, which is brought into the checkout's root by itself.
# What the other machine has is said by variables (their defaults are those of a PyTorch image):
#
#   TORCH=2.11        its torch, which decides on FBGEMM and TORCHREC unless these are given too
#   TARGET=3.12       its Python
#   ARCH=90           its GPU: 80 (A100), 90 (H100, H200), 100 (B200)
#   HAS="numpy ..."   distributions that are there already, or a file with one name a line (as pip freeze prints)
#   LIMIT=64          MiB that the checkout and .gpu/ may take together
#
# The slow part, some minutes of a core for fbgemm's wheel, is done once and kept in ~/.cache/tandemrec-gpu.
set -euo pipefail
case ${1:-} in -*) sed -n '2,/^set/{/^set/d;s/^#\( \|$\)//;p}' "$0"; exit 2 ;; esac
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
checkout=$(cd "${1:-$here/../..}" && pwd)
log=${2:-}
[ -z "$log" ] || [ -f "$log/manifest.json" ] || { echo "$log is no sequence log (no manifest.json)" >&2; exit 2; }
TORCH=${TORCH:-2.11} TARGET=${TARGET:-3.12} ARCH=${ARCH:-90} LIMIT=${LIMIT:-64}
HAS=${HAS:-numpy pyarrow pandas safetensors tensorboard protobuf absl-py pytest iniconfig pluggy pygments \
  hypothesis sortedcontainers typing-extensions fsspec sympy mpmath setuptools tqdm}

# torch <-> fbgemm <-> torchrec: fbgemm's binaries load on one torch only.
case $TORCH in
  2.11*) pair=(1.6.0 1.6.1) ;;
  2.13*) pair=(1.8.0 1.8.0) ;;
  *) pair=("${FBGEMM:?no pair is known for torch $TORCH: set FBGEMM and TORCHREC}" "${TORCHREC:?set TORCHREC too}") ;;
esac
FBGEMM=${FBGEMM:-${pair[0]}} TORCHREC=${TORCHREC:-${pair[1]}}

python=$checkout/.venv/bin/python
[ -x "$python" ] || { echo "$checkout has no .venv: make install-dev there first" >&2; exit 2; }
if [ -f "$HAS" ]; then HAS=$(sed 's/[ =@<>].*//' "$HAS"); fi
of_target=(--no-deps --only-binary=:all: --implementation cp --python-version "$TARGET")
for glibc in 2_28 2_27 2_17 2014 1; do
  case $glibc in 2_*) tag=manylinux_$glibc ;; *) tag=manylinux$glibc ;; esac
  of_target+=(--platform "${tag}_x86_64")
done
fetch() { # fetch FOLDER REQUIREMENT...
  "$python" -m pip download --quiet "${of_target[@]}" -d "$@"
}

cache=${XDG_CACHE_HOME:-$HOME/.cache}/tandemrec-gpu/fbgemm-$FBGEMM-cp${TARGET/./}-sm$ARCH
if [ ! -f "$cache/done" ]; then
  rm -rf "$cache"
  mkdir -p "$cache/wheel"
  fetch "$cache/wheel" "fbgemm-gpu==$FBGEMM"
  (cd "$checkout" && nice "$python" -m benchmarks.gpu.shrink "$cache"/wheel/*.whl "$cache" --arch "$ARCH")
  rm -rf "$cache/wheel"
  touch "$cache/done"
fi

gpu=$checkout/.gpu
rm -rf "$gpu" "$checkout/.gpu-log"
mkdir -p "$gpu/wheels"
cp "$cache"/*.tar.xz "$here/on_device.sh" "$gpu/"
# shellcheck disable=SC2086
needs=$(cd "$checkout" && "$python" -m benchmarks.gpu.needs --has $HAS)
# shellcheck disable=SC2086
fetch "$gpu/wheels" "torchrec==$TORCHREC" $needs

mib() { # of the files that git knows or would take, and of what is named
  (cd "$checkout" && { git ls-files -z -co --exclude-standard; find "$@" -type f -print0; } | sort -zu |
    xargs -0 stat -c %s 2> /dev/null | awk '{s += $1} END {printf "%d", s / 2^20 + 1}')
}
if [ -n "$log" ]; then
  cp -rL "$log" "$gpu/log"
  if [ "$(mib .gpu)" -gt "$LIMIT" ]; then
    mv "$gpu/log" "$checkout/.gpu-log"
    echo "the log has no room beside the rest: .gpu-log/ is to be brought by itself"
  fi
fi
(cd "$checkout" && du -ah --apparent-size .gpu | sort -h | tail -n 20)
total=$(mib .gpu)
echo "the checkout with .gpu/ takes $total of $LIMIT MiB (torch $TORCH, Python $TARGET, fbgemm $FBGEMM, torchrec $TORCHREC, sm_$ARCH)"
[ "$total" -le "$LIMIT" ] || { echo "too much: raise LIMIT, or name more of what is there already in HAS" >&2; exit 1; }
