-- The body comes by the environment, as wrk takes none on its command line.
wrk.method = "POST"
wrk.headers["Content-Type"] = "application/json"
if (os.getenv("BENCH_KEY") or "") ~= "" then wrk.headers["X-API-Key"] = os.getenv("BENCH_KEY") end
local file = io.open(os.getenv("BENCH_BODY"), "rb")
wrk.body = file:read("*a")
file:close()

done = function(summary, latency, requests)
  io.write(string.format(
    '\nRESULT {"requests": %d, "seconds": %f, "p50_ms": %f, "p99_ms": %f, "errors": %d}\n',
    summary.requests, summary.duration / 1e6, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
    summary.errors.connect + summary.errors.read + summary.errors.write + summary.errors.status + summary.errors.timeout))
end
