"""A thin gateway in front of vLLM model servers."""
