"""How calls are spread over several vLLM servers, by simulation: what each policy makes of their prefix caches."""
