#!/usr/bin/env bash
# Stands in for vLLM-Gaudi's, which needs a Gaudi: takes the options that it documents, tells of itself in the file $SAID
# (/dev/stderr where there is none), and leaves its results where that one does.
set -e
cd "$(dirname "$0")"
SAID=${SAID:-/dev/stderr}
{ echo "$@"; pwd; env; } >>"$SAID"
while getopts "m:b:l:t:d:h:o:r:ue" OPT; do
  case $OPT in
    m) model=$OPTARG ;;
    d) dataset=$OPTARG ;;
    o) out=$(realpath "$OPTARG") ;;
    b | l | t | h | r | u | e) ;;
    *) exit 1 ;;
  esac
done
tr -cd '[:print:]' <"$dataset" >>"$SAID"
touch written-beside-it
name=$(basename "$model")
name=${name,,}
mkdir -p "$out/$name/g3"
# Before anything is measured, as that one does.
echo '{"mode": "QUANTIZE"}' >"$out/$name/maxabs_quant_g3.json"
[ -z "$FAIL" ]
