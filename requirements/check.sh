#!/usr/bin/env bash
# Whether the requirement sets can be installed on Linux x86-64 with Python 3.11 and 3.12: every pinned
# release is there as a wheel for it. Needs uv, and downloads metadata only.
#
#   bash requirements/check.sh            # `make pins` does it
set -euo pipefail
cd "$(dirname "$0")"

TORCH=$(sed -n 's/^TORCH = //p' ../Makefile)
# The one release that is there as source only: pure Python, which pip builds in a second.
SDIST=iopath
PLATFORM=x86_64-manylinux_2_28

for python in 3.11 3.12; do
  for device in cpu cuda; do
    options=(--quiet --no-header --no-annotate --python-platform "$PLATFORM" --python-version "$python"
      --only-binary :all: --no-binary "$SDIST")
    # As they are installed: the set without dependencies, torch with its own.
    pinned=$(uv pip compile "${options[@]}" --no-deps "$device.txt" s3.txt | wc -l)
    torch=$(uv pip compile "${options[@]}" - <<< "$TORCH" | wc -l)
    echo "python $python, $device and s3: $pinned releases, and $TORCH with $((torch - 1)) more; source: $SDIST"
  done
done
