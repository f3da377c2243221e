#!/usr/bin/env bash
# vLLM's own serving benchmark as load: 40 streamed chats of random words, eight at a time.
#
#   pip install vllm
#   bash examples/benchmark.sh
#
# What is written behind goes to `vllm bench serve`, such as --num-prompts 1000. It takes the words from the tokenizer of
# the model that the server names; where that is none of the hub's, as it is a folder: --tokenizer NAME-OR-FOLDER.
set -euo pipefail

exec vllm bench serve --base-url "${BASE_URL:-http://localhost:9000}" \
  --backend openai-chat --endpoint /v1/chat/completions \
  --dataset-name random --random-input-len 64 --random-output-len 32 \
  --num-prompts 40 --max-concurrency 8 --temperature 0 "$@"
