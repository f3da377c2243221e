#!/usr/bin/env bash
# The model server alone, without the gateway: `LLM_DEVICE=cpu ./run_vllm.sh`; hpu where nothing is said, or cuda.
# Its settings are docker/<device>/.env, read by Docker Compose itself; the shell's own variables win over them. A model over
# several machines, on each of them: `./run_vllm.sh --nnodes 2 --node-rank 0 --master-addr A`, on the next `--node-rank 1`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

fail() {
  echo "run_vllm.sh: $*" >&2
  exit 1
}

device=${LLM_DEVICE:-hpu}
case $device in
  cpu | hpu | cuda) ;;
  *) fail "LLM_DEVICE must be cpu, hpu or cuda, but it is '$device'." ;;
esac
while [ $# -gt 0 ]; do
  name=${1%%=*}
  case $name in
    --nnodes) variable=VLLM_NNODES ;;
    --node-rank) variable=VLLM_NODE_RANK ;;
    --master-addr) variable=VLLM_MASTER_ADDR ;;
    *) fail "There is no option $name, but --nnodes, --node-rank and --master-addr: all else is set in docker/$device/.env." ;;
  esac
  [ "$name" = "$1" ] || set -- "$name" "${1#*=}" "${@:2}"
  [ -n "${2:-}" ] || fail "$name needs a value."
  export "$variable=$2"
  shift 2
done
compose=(docker compose --env-file "docker/$device/.env" --file "docker/$device/docker-compose.yaml")

# Whether version $1 is at least $2.
at_least() { [ "$(printf '%s\n' "$2" "$1" | sort --version-sort | head -n 1)" = "$2" ]; }

command -v docker >/dev/null || fail "Docker is not installed: https://docs.docker.com/engine/install has how."
version=$(docker compose version --short 2>/dev/null) ||
  fail "Docker has no Compose: install its plugin (Debian and Ubuntu: docker-compose-plugin)."
at_least "${version#v}" 2.20 || fail "Docker Compose is $version, but 2.20 or newer is needed: update its plugin."
runtimes=$(docker info --format '{{json .Runtimes}}' 2>/dev/null) ||
  fail "The Docker engine cannot be reached: start it (systemctl start docker), and see that you may use it (group docker)."

# A setting of the model server's, as the shell or the file has it; $2 where neither does.
setting() {
  local found
  found=$(sed -n "s/^ *$1: \"\{0,1\}\([^\"]*\)\"\{0,1\}\$/\1/p" <<<"$config" | head -n 1)
  echo "${found:-$2}"
}

whole() { [[ $2 =~ ^(0|[1-9][0-9]{0,5})$ ]] || fail "$1 must be a whole number, but it is '$2'."; }

# As vLLM in its container would say, but by then the container starts anew for ever.
check_nodes() {
  local config nodes rank master tp pp
  config=$("${compose[@]}" config llm-vllm-model-server)
  nodes=$(setting VLLM_NNODES 1) rank=$(setting VLLM_NODE_RANK 0) master=$(setting VLLM_MASTER_ADDR "")
  tp=$(setting VLLM_TP_SIZE "$(setting NUM_GPU 1)") pp=$(setting VLLM_PP_SIZE 1)
  whole "--nnodes (VLLM_NNODES)" "$nodes"
  whole "--node-rank (VLLM_NODE_RANK)" "$rank"
  [ "$nodes" -gt 0 ] || fail "--nnodes (VLLM_NNODES) must be 1 or more, but it is $nodes."
  [ "$rank" -lt "$nodes" ] ||
    fail "--node-rank (VLLM_NODE_RANK) must be less than --nnodes, from 0 to $((nodes - 1)), but it is $rank: count machines from 0."
  [ "$nodes" -gt 1 ] || return 0
  [ -n "$master" ] ||
    fail "--nnodes is $nodes, but --master-addr (VLLM_MASTER_ADDR) is not given: give all machines the address of the first one."
  # What EXTRA_ARGS or a file say of sizes counts more, and is vLLM's to read.
  if [ -z "$(setting VLLM_CONFIG "")" ] && ! grep --quiet "parallel.size" <<<"$config"; then
    whole VLLM_TP_SIZE "$tp"
    whole VLLM_PP_SIZE "$pp"
    [ $((tp * pp % nodes)) = 0 ] ||
      fail "VLLM_TP_SIZE ($tp) times VLLM_PP_SIZE ($pp) must be a multiple of --nnodes, but $((tp * pp)) devices cannot be parted over $nodes machines: set both in docker/$device/.env."
  fi
  export VLLM_NNODES=$nodes VLLM_NODE_RANK=$rank VLLM_MASTER_ADDR=$master LLM_DEVICE=$device
  compose=(docker compose --env-file "docker/$device/.env" --file compose.nodes.yaml)
}

check_hpu() {
  grep --quiet '"habana"' <<<"$runtimes" ||
    fail "Docker has no runtime habana: install habanalabs-container-runtime, register it in /etc/docker/daemon.json, and restart Docker."
  command -v hl-smi >/dev/null || fail "hl-smi is missing: install Intel's Gaudi driver and tools (habanalabs-dkms, habanalabs-firmware-tools)."
  local driver image
  driver=$(hl-smi --query-aip=driver_version --format=csv,noheader | sed -n '1s/[^0-9]*\([0-9]*\.[0-9]*\).*/\1/p') || driver=""
  [ -n "$driver" ] || fail "hl-smi tells no driver version: see that a Gaudi is there (lspci -d 1da3:)."
  image=$("${compose[@]}" config --images llm-vllm-model-server | sed -n 's,.*gaudi-docker/\([0-9]*\.[0-9]*\).*,\1,p')
  if [ -n "$image" ] && [ "$driver" != "$image" ]; then
    fail "The Gaudi driver is $driver, but the image is for $image: install that driver, or set LLM_VLLM_IMAGE to an image for $driver."
  fi
}

check_cuda() {
  command -v nvidia-smi >/dev/null || fail "nvidia-smi is missing: install NVIDIA's driver."
  command -v nvidia-ctk >/dev/null || command -v nvidia-container-cli >/dev/null || grep --quiet '"nvidia"' <<<"$runtimes" ||
    fail "Docker cannot reach the GPUs: install nvidia-container-toolkit, run 'nvidia-ctk runtime configure', and restart Docker."
  local which gpus name capability
  which=$("${compose[@]}" config | sed -n 's/.*CUDA_VISIBLE_DEVICES: "*\([^"]*\)"*$/\1/p')
  gpus=$(nvidia-smi --query-gpu=name,compute_cap --format=csv,noheader ${which:+--id="$which"}) || gpus=""
  [ -n "$gpus" ] || fail "nvidia-smi shows no GPU: see that the driver runs, and what CUDA_VISIBLE_DEVICES says."
  while IFS=, read -r name capability; do
    at_least "${capability// /}" 7.5 ||
      fail "vLLM needs a GPU of compute capability 7.5 or newer, but $name has${capability}: leave it out with CUDA_VISIBLE_DEVICES, use another machine, or see docs/older-gpus.md for an older vLLM."
  done <<<"$gpus"
}

check_nodes
case $device in
  hpu) check_hpu ;;
  cuda) check_cuda ;;
esac

"${compose[@]}" up --detach llm-vllm-model-server
echo "vLLM starts; what it does: docker logs --follow llm-vllm-model-server. To end it: docker compose down"
