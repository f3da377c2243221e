#!/usr/bin/env bash
# Plain curl: is it ready, the simplified form whole and streamed, and OpenAI's form.
#
#   bash examples/curl.sh
set -euo pipefail
url="${BASE_URL:-http://localhost:9000}"
model="${MODEL:-demo-model}"

curl -sS --fail-with-body "$url/v1/health_check"
echo

curl -sS --fail-with-body "$url/v1/chat/completions" -d '{
  "messages": {"system": "### You are a helpful assistant. ### Search results: \n\n", "user": "### Question: What is vLLM? \n\n"},
  "max_new_tokens": 64, "streaming": false
}'
echo

# -N shows each piece as it comes.
curl -sSN --fail-with-body "$url/v1/chat/completions" -d '{
  "messages": {"system": "### You are a helpful assistant. ### Search results: \n\n", "user": "### Question: Who are you? \n\n"},
  "max_new_tokens": 64, "streaming": true
}'

curl -sS --fail-with-body "$url/v1/chat/completions" -d '{
  "model": "'"$model"'", "messages": [{"role": "user", "content": "What is vLLM?"}], "temperature": 0
}'
echo
