"""`python -m gateway` is the command `vllm-gateway`."""

from gateway.cli import main

main()
