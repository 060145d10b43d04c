#!/usr/bin/env bash
# Every measured claim, one after another on an otherwise idle machine; writes bench/RESULTS.md.
#   bash bench/run_all.sh [SECTION ...]        sections: crash checkpoint resume loader model ddp learn soak
set -uo pipefail
cd "$(dirname "$0")/.."
mkdir -p bench/results
sections=("$@")
[ $# -gt 0 ] || sections=(crash checkpoint resume loader model ddp learn soak)
for name in "${sections[@]}"; do
  echo "== bench/$name.py"
  {
    echo "## $name"
    echo
    echo "\`python bench/$name.py\`, $(date +%F), $(grep -m1 'model name' /proc/cpuinfo | cut -d: -f2 | xargs) with $(nproc --all) cores, $(uname -sr), $(python -c 'import sys, torch; print(f"Python {sys.version.split()[0]}, torch {torch.__version__}", end=""); print(f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ", no GPU")')"
    echo
    python "bench/$name.py" 2>&1 | grep -vE "Warning|^(epoch|saved|checkpoints|train|validation|model|resume|results)|^[0-9]+ read|^    (file|resume|[a-z_0-9]+\.pt|[0-9]+ names)|^ -> |tmp.*checkpoints"
    echo
  } > "bench/results/$name.md"
done
{
  echo "# Measured"
  echo
  echo "Written by \`bash bench/run_all.sh\`. Ratios are within one run; absolute times on a shared machine are noise."
  echo
  cat bench/results/*.md
} > bench/RESULTS.md
