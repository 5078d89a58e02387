#!/usr/bin/env bash
# Install the kit beside this script without network, and run the GPU check: bash run.sh [--minutes 8] [options of the check]
# PYTHON names the interpreter (python3 by default), WORK the folder for the environment and the report (here by default).
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
work="${WORK:-$here}"
started=$SECONDS
minutes=8
options=()
while [ $# -gt 0 ]; do
  case "$1" in
    --minutes) minutes="$2"; shift 2 ;;
    --minutes=*) minutes="${1#*=}"; shift ;;
    *) options+=("$1"); shift ;;
  esac
done
mkdir -p "$work/report"

(cd "$here" && sha256sum --quiet --check SHA256SUMS) || { echo "error: a file of the kit was damaged on its way; copy it again." >&2; exit 1; }
kit="$here"
if [ -e "$here/kit.tar.000" ]; then
  kit="$work"
  cat "$here"/kit.tar.[0-9]* | tar -x -C "$work"
fi

# The machine's own packages stay visible: torch, cuda-bindings and NVIDIA's libraries are not part of the kit.
"${PYTHON:-python3}" -m venv --system-site-packages "$work/venv"
python="$work/venv/bin/python"
# A virtual environment's own `--system-site-packages` shows the base interpreter's; show those of the one it was made with.
"${PYTHON:-python3}" -c 'import site, sysconfig; print("\n".join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}))' \
  > "$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/machine.pth"
"$python" -m pip install --quiet --no-index --disable-pip-version-check --find-links "$kit/wheels" --requirement "$kit/wheels/requirements.txt" \
  || { echo "error: the wheels do not fit $("$python" --version) on $(uname -m); make the kit with --python and --machine for it." >&2; exit 1; }

# NVIDIA's libraries as pip lays them out, and as the system does, on the loader's path.
libraries="$("$python" - <<'PYTHON'
import glob, sys
print(":".join(sorted({path for folder in sys.path for pattern in ("nvidia/*/lib", "nvidia/lib", "tensorrt_libs", "tensorrt_rtx_libs")
                       for path in glob.glob(f"{folder}/{pattern}")})))
PYTHON
)"
for folder in /usr/local/nvidia/lib64 /usr/local/cuda/lib64 /usr/lib/x86_64-linux-gnu/nvidia /usr/lib/aarch64-linux-gnu/nvidia; do
  [ -d "$folder" ] && libraries="$libraries:$folder"
done
export LD_LIBRARY_PATH="$libraries${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"

bundles=()
for folder in "$kit"/bundles/*/; do
  [ -d "$folder" ] && bundles+=(--bundle "${folder%/}")
done
left="$("$python" -c "print(max(0.2, $minutes - ($SECONDS - $started) / 60))")"
cd "$kit/sources"
export XDG_CACHE_HOME="$work/cache" PYTHONDONTWRITEBYTECODE=1
exec "$python" -m benchmarks.gpu_check --out "$work/report" --minutes "$left" ${bundles[@]+"${bundles[@]}"} ${options[@]+"${options[@]}"}
