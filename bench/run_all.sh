#!/usr/bin/env bash
# Every measured claim, one after another on an otherwise idle machine; writes bench/RESULTS.md. Stops at the first that fails.
#   pip install -r bench/requirements.txt && SEIZURETRANSFORMER=FOLDER bash bench/run_all.sh [SECTION ...]
# sections: crash checkpoint resume loader model ddp learn race transfer also augment soak pairs triples; by name alone clips, and real
# with REAL=FILE that bench/real.py has written to --out, and siena with SIENA=FOLDER, see bench/siena.py. FOLDER: see bench/model.py; without it that row is left out.
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p bench/results
sections=("$@")
[ $# -gt 0 ] || sections=(crash checkpoint resume loader model ddp learn race transfer also augment soak pairs triples)
# sections that are a mode of another's file
declare -A modes=([real]="real.py --table ${REAL:-}" [race]="learn.py --race" [transfer]="learn.py --transfer" [clips]="learn.py --transfer --seeds 1" [siena]="learn.py --on ${SIENA:-}" [also]="learn.py --also-real" [pairs]="soak.py --pairs" [triples]="soak.py --triples 60")
machine="$(grep -m1 'model name' /proc/cpuinfo | cut -d: -f2 | xargs) with $(nproc --all) cores, $(uname -sr), $(python -c '
import sys, torch
gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
print(f"Python {sys.version.split()[0]}, torch {torch.__version__}, {gpu}")')"
for name in "${sections[@]}"; do
  command="${modes[$name]:-$name.py}"
  if [ "$name" = race ] && [ -z "${SEIZURETRANSFORMER:-}" ]; then
    echo "== race left out: SEIZURETRANSFORMER names no folder"
    continue
  fi
  echo "== bench/$command"
  python bench/$command > "bench/results/$name.out" 2> "bench/results/$name.log" || { tail -5 "bench/results/$name.log"; exit 1; }
  { printf '## %s\n\n`python bench/%s`, %s, %s\n\n' "$name" "$command" "$(date +%F)" "$machine"
    cat "bench/results/$name.out"
    echo
  } > "bench/results/$name.md"
done
{ printf '# Measured\n\nWritten by `bash bench/run_all.sh`. Ratios are within one run; absolute times on a shared machine are noise.\n\n'
  cat bench/results/*.md
} > bench/RESULTS.md
