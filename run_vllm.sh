#!/usr/bin/env bash
# The model server alone, without the gateway: `LLM_DEVICE=cpu ./run_vllm.sh`; hpu where nothing is said, or cuda.
# Its settings are docker/<device>/.env, read by Docker Compose itself; the shell's own variables win over them.
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
compose=(docker compose --env-file "docker/$device/.env" --file "docker/$device/docker-compose.yaml")

# Whether version $1 is at least $2.
at_least() { [ "$(printf '%s\n' "$2" "$1" | sort --version-sort | head -n 1)" = "$2" ]; }

command -v docker >/dev/null || fail "Docker is not installed: https://docs.docker.com/engine/install has how."
version=$(docker compose version --short 2>/dev/null) ||
  fail "Docker has no Compose: install its plugin (Debian and Ubuntu: docker-compose-plugin)."
at_least "${version#v}" 2.20 || fail "Docker Compose is $version, but 2.20 or newer is needed: update its plugin."
runtimes=$(docker info --format '{{json .Runtimes}}' 2>/dev/null) ||
  fail "The Docker engine cannot be reached: start it (systemctl start docker), and see that you may use it (group docker)."

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

case $device in
  hpu) check_hpu ;;
  cuda) check_cuda ;;
esac

"${compose[@]}" up --detach llm-vllm-model-server
echo "vLLM starts; what it does: docker logs --follow llm-vllm-model-server. To end it: docker compose down"
