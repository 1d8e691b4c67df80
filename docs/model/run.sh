#!/usr/bin/env bash
# Checks the model of KEK rotation: it must hold, and each way of breaking it must give a counterexample.
#   run.sh                    everything; exits 1 if the model fails, or if a broken one passes
#   run.sh trace SWITCH...    the shortest counterexample of a broken model, e.g.: run.sh trace NO_CAS NO_CUTS
# Needs spin and a C compiler. About a minute on one core, under 1.5 GiB.
set -euo pipefail

model="$(cd "$(dirname "$0")" && pwd)/rotation.pml"
for need in spin "${CC:-gcc}"; do
  command -v "$need" >/dev/null || { echo "run.sh: $need is missing: apt-get install spin gcc" >&2; exit 2; }
done
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
cd "$work"
failures=0

# Breadth first gives the shortest counterexample, depth first needs less memory for the whole space.
# search depth|breadth SWITCH...
search() {
  local order=(-DSAFETY -O2) arguments=(-E -n -w24 -m3000000)
  if [ "$1" = breadth ]; then
    # These searches are short: compiling would take most of their time.
    order=(-DBFS -O0)
    arguments=(-E -n -w20)
  fi
  shift
  rm -f ./*
  spin "${@/#/-D}" -a "$model" >spin.log 2>&1 || { cat spin.log >&2; exit 2; }
  # No partial order reduction: everything is shared, so it would find nothing to reduce.
  "${CC:-gcc}" -w "${order[@]}" -DNOREDUCE -DMEMLIM=3500 -o pan pan.c
  ./pan "${arguments[@]}" >pan.log 2>&1 || true
}

figure() { sed -nE "s/$1/\\1/p" pan.log | head -n 1; }

report() { # verdict, what, facts
  printf '%-6s %-34s %s\n' "$1" "$2" "$3"
  if [ "$1" = FAILED ]; then failures=$((failures + 1)); fi
}

# The model holds in all reachable states.
holds() { # name, switches
  local name=$1 verdict=FAILED
  shift
  search depth "$@"
  if [ "$(figure '.*errors: ([0-9]+).*')" = 0 ] && ! grep -qE 'depth too small|out of memory|memory bound' pan.log; then
    verdict=holds
  fi
  report $verdict "$name" "$(figure ' *([0-9.e+]+) states, stored.*') states, $(figure ' *([0-9.e+]+) transitions .*'
    ) transitions, depth $(figure '.*depth reached ([0-9]+).*'), $(figure '.*elapsed time ([0-9.]+) .*') s $(
    figure '(pan:1: .*)')"
}

# A counterexample is found.
breaks() { # switches
  local verdict=FAILED found
  search breadth "$@"
  found="$(figure 'pan:1: assertion violated (.*)')"
  if [ -n "$found" ]; then verdict=breaks; fi
  report $verdict "$*" "${found:-no counterexample $(figure '(pan:1: .*)')}"
}

reaches() { # probe
  local verdict=FAILED found
  search breadth SAFETY_ONLY NO_CUTS "PROBE=$1"
  found="$(figure 'pan:1: assertion violated .*\((at depth [0-9]+)\)')"
  if [ -n "$found" ]; then verdict=found; fi
  report $verdict "probe $1" "${found:-never}"
}

if [ "${1:-}" = trace ]; then
  shift
  search breadth "$@"
  grep -E '^pan:1' pan.log || { echo "no counterexample"; exit 1; }
  # What each step changed; a step is a whole d_step.
  spin "${@/#/-D}" -k ./*.trail -g -p "$model" | awk '
    function flush(   line, name) {
      for (name in now) if (now[name] != before[name]) { line = line "  " name "=" now[name]; before[name] = now[name] }
      if (line != "") print step ": " who line
    }
    /^ *[0-9]+:\tproc/ {
      split($0, part, ":")
      if (part[1] + 0 != step) { flush(); step = part[1] + 0 }
      who = $4 ")"; sub(/\(/, "", who); sub(/:.*/, "", who); who = who " " $3
    }
    /^\t\t[a-z_0-9\[\]]+ = / && $1 != "tmp" {
      if (!($1 in before)) before[$1] = 0
      now[$1] = $3
    }
    END { flush() }'
  exit
fi

holds "two tags"
holds "both keys in one tag" ONE_TAG
holds "no reduction, no power cuts" NO_TIDY NO_CUTS
holds "no reduction, one run at a time" NO_TIDY ONE_RUN
breaks SAFETY_ONLY NO_FLOOR
breaks SAFETY_ONLY NO_FLOOR HARM_ONLY
breaks SAFETY_ONLY NO_FENCE
breaks SAFETY_ONLY NO_FENCE HARM_ONLY NO_CUTS
breaks SAFETY_ONLY NO_CAS
breaks SAFETY_ONLY NO_CAS NO_CUTS
breaks SAFETY_ONLY ACK_BEFORE_DURABLE
breaks SAFETY_ONLY VERIFY_WITHOUT_SYNC
breaks SAFETY_ONLY ACTIVATE_BEFORE_LOADED
breaks SAFETY_ONLY ADD_OVERWRITES
breaks SAFETY_ONLY RETIRE_TRUSTS_CENSUS
breaks NO_ADOPT
for probe in STALE_KEK FENCED_OFF LOST_LOCK OTHER_BLOB BOTH_DONE; do
  reaches $probe
done

if [ "$failures" -gt 0 ]; then
  echo "$failures failed" >&2
  exit 1
fi
