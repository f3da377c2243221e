"""The manifests on a cluster in small: real images, the real vLLM and the demo model; what is ours is the cluster.

Not among the tests that `make test` finds; `make test-cluster` runs it. In their order: each goes on from
the one before.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json
import re
import sys
import time
from pathlib import Path

import httpx
import pytest

from gateway.pool.upstream_pool import Upstream
from tests.heavy.cluster.calls import Call, Callers
from tests.heavy.cluster.cluster import NODE_GRACE, SPREAD, Cluster
from tests.heavy.cluster.conftest import Play, Rendered, secret, settings
from tests.heavy.cluster.kubelet import Pod
from tests.heavy.kubernetes.checks import quantity
from tests.heavy.kubernetes.kustomized import named

GATEWAY, VLLM = "vllm-gateway", "model-server"
KEY = "the-key-of-vllm"
AUTOSCALING = "ROOT/kubernetes/components/autoscaling"
# GATEWAY_PROBE_INTERVAL, and a second more.
KNOWN_WITHIN = 2.0
# For gateways that nobody calls.
AT_ONCE = settings(GATEWAY, "GATEWAY_DRAIN_DELAY=0")
# The overlay's GATEWAY_TCP_KEEPALIVE.
MISSED_WITHIN = 12.0


def all_wait(cluster: Cluster, why: str, *owners: str) -> bool:
    """Whether all pods of these wait for that."""
    pods = [pod for owner in owners for pod in cluster.of(owner)]
    return bool(pods) and all(pod.why.startswith(why) for pod in pods)


async def status(pod: Pod, path: str) -> int:
    async with httpx.AsyncClient(trust_env=False, timeout=10) as client:
        return (await client.get(f"http://{pod.address}:9000{path}")).status_code


def hashed(pod: Pod) -> str:
    """What a vLLM is called in answers."""
    return Upstream.from_url("http://model-server:8008", at=pod.address).short_name


async def settled(cluster: Cluster, seconds: float = 500) -> None:
    """All is rolled out, nothing ends any more, and every client knows the gateways."""
    await cluster.until(lambda: all(cluster.is_rolled_out(name) for name in (GATEWAY, VLLM)), seconds)
    await cluster.until(lambda: not any(pod.ending for pod in cluster.pods), 160)
    addresses = [pod.address for pod in cluster.of(GATEWAY)]
    async with asyncio.timeout(2 * SPREAD):
        while sorted(cluster.proxied(GATEWAY)) != sorted(addresses):  # noqa: ASYNC110 - changes as time passes
            await asyncio.sleep(0.1)


async def listens(pod: Pod, seconds: float = 500) -> None:
    """A vLLM does, which its kubelet may not have seen yet."""
    async with httpx.AsyncClient(trust_env=False, timeout=5) as client, asyncio.timeout(seconds):
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if (await client.get(f"http://{pod.address}:8008/health")).is_success:
                    return
            await asyncio.sleep(0.2)


@pytest.fixture
def callers(cluster: Cluster) -> Callers:
    return Callers(lambda: cluster.proxied(GATEWAY))


def test_an_image_that_cannot_be_pulled_is_told_by_its_name(cluster: Cluster, rendered: Rendered, play: Play) -> None:
    async def story() -> None:
        # A registry that is not there.
        cluster.apply(rendered(images=[{"name": "vllm-gateway", "newName": "127.0.0.1:9/vllm-gateway"}]))
        await cluster.until(lambda: all_wait(cluster, "ErrImagePull", GATEWAY, VLLM), 30)
        assert '"127.0.0.1:9/vllm-gateway:test-cluster"' in cluster.of(GATEWAY)[0].why

    play(story())


def test_a_vllm_without_its_secret_is_told_by_the_secrets_name(
    cluster: Cluster, rendered: Rendered, play: Play
) -> None:
    async def story() -> None:
        cluster.apply(rendered())
        said = 'CreateContainerConfigError: secret "model-server-key" not found'
        await cluster.until(lambda: all_wait(cluster, said, VLLM), 60)

    play(story())


def test_without_a_vllm_that_gets_ready_no_gateway_is(cluster: Cluster, rendered: Rendered, play: Play) -> None:
    async def story() -> None:
        cluster.apply([secret("model-server-key", LLM_VLLM_API_KEY=KEY)])
        # As the document says of a Secret that comes after the gateway.
        cluster.restart(GATEWAY)
        cluster.apply(rendered(**settings(VLLM, "LLM_VLLM_MODEL_NAME=/data/none")))
        await cluster.until(lambda: all_wait(cluster, "CrashLoopBackOff", VLLM), 200)
        running = [pod for pod in cluster.of(GATEWAY) if pod.why == "Running"]
        assert running
        for pod in running:
            assert await status(pod, "/health") == 200
            assert await status(pod, "/v1/health_check") == 503
            assert pod.restarts == 0
        assert cluster.named(VLLM) == cluster.proxied(GATEWAY) == []

    play(story())


def test_cold_start(cluster: Cluster, rendered: Rendered, play: Play, callers: Callers) -> None:
    async def story() -> None:
        before = cluster.of(VLLM)
        cluster.apply([secret("model-server-key", LLM_VLLM_API_KEY=KEY), *rendered()])
        # The volume is of one node: the next comes once the last is gone.
        assert all(pod.ending for pod in before)
        assert cluster.of(VLLM) == [] or not before
        await settled(cluster)
        assert all(pod.restarts == 0 for pod in cluster.pods)
        async with callers.calling(4, (5, 5)):
            await callers.until(lambda: len(callers.calls) >= 20)
        assert callers.outcomes.keys() == {"answered"}

    play(story())


def test_the_pods_may_do_what_is_written_and_no_more(cluster: Cluster, rendered: Rendered, play: Play) -> None:
    """By what the kernel has of their processes."""

    async def story() -> None:
        for pod in cluster.pods:
            found = await cluster.engine.ask("GET", f"/containers/{pod.container}/json")
            process = Path("/proc") / str(found["State"]["Pid"])
            rights = r"^(?:Uid|Gid|CapEff|CapBnd|NoNewPrivs|Seccomp):\t(\S+)"
            assert re.findall(rights, (process / "status").read_text(), re.MULTILINE) == [
                *("1000", "1000", "0000000000000000", "0000000000000000", "1", "2")
            ]
            mounts = dict(re.findall(r"^(?:\S+ ){4}(\S+) (\S+)", (process / "mountinfo").read_text(), re.MULTILINE))
            assert mounts["/"].startswith("ro")
            (container,) = pod.template["spec"]["containers"]
            for mount in container["volumeMounts"]:
                assert mounts[mount["mountPath"]].startswith("ro" if mount.get("readOnly") else "rw")
            limit = quantity(container["resources"]["limits"]["memory"])
            assert found["HostConfig"]["Memory"] == limit
            environ = (process / "environ").read_text().split("\0")
            # Which vLLM has under its own name.
            assert {f"LLM_VLLM_API_KEY={KEY}", f"VLLM_API_KEY={KEY}"} & {*environ}
            # No Service of which there are variables.
            assert not [one for one in environ if one.startswith(("VLLM_GATEWAY_", "MODEL_SERVER_"))]
            if pod.owner == VLLM:
                shm = re.search(r" /dev/shm \S+ .* - tmpfs \S+ \S*size=(\d+)k", (process / "mountinfo").read_text())
                assert shm is not None
                assert int(shm[1]) * 1024 == quantity("4Gi")

    play(story())


def test_ten_rollouts_of_the_gateway_lose_and_cut_nothing(cluster: Cluster, play: Play, callers: Callers) -> None:
    async def story() -> None:
        before = len(cluster.gone)
        # None is longer than GATEWAY_DRAIN_TIMEOUT, on a busy machine, too.
        async with callers.calling(44, (40, 120)), callers.calling(6, (120, 150)):
            await callers.until(lambda: len(callers.calls) >= 50)
            for _ in range(10):
                cluster.restart(GATEWAY)
                await cluster.until(lambda: cluster.is_rolled_out(GATEWAY), 90)
        await settled(cluster)
        gone = cluster.gone[before:]
        assert len(gone) == 20
        assert callers.outcomes == {"answered": len(callers.calls)}
        # Calls ran on while their gateway was told to end, and it ended by itself.
        ended_at = {pod.address: pod.when("SIGTERM") for pod in gone}
        spanned = [call for call in callers.calls if call.sent_at < ended_at.get(call.gateway, 0) < call.ended_at]
        assert len(spanned) >= 100
        assert all(ends_by_itself(pod) for pod in gone)

    play(story())


def ends_by_itself(pod: Pod) -> bool:
    told = [what for _, what in pod.told]
    return "SIGKILL" not in told and f"{pod.template['spec']['containers'][0]['name']} ended with 0" in str(told)


def test_a_gateway_that_is_deleted_loses_and_cuts_nothing(cluster: Cluster, play: Play, callers: Callers) -> None:
    async def story() -> None:
        async with callers.calling(20, (50, 100)):
            await callers.until(lambda: len(callers.calls) >= 20)
            pod = cluster.of(GATEWAY)[0]
            cluster.delete(pod)
            await cluster.until(lambda: pod.gone and cluster.is_rolled_out(GATEWAY), 90)
        assert callers.outcomes == {"answered": len(callers.calls)}
        assert ends_by_itself(pod)

    play(story())


@pytest.mark.parametrize("probe", ["startupProbe", "livenessProbe"])
def test_a_gateway_that_is_not_well_is_started_anew_and_stands_in_for_none(
    cluster: Cluster, rendered: Rendered, play: Play, probe: str
) -> None:
    patch = [
        {"op": "replace", "path": f"/spec/template/spec/containers/0/{key}", "value": value}
        for key, value in {
            f"{probe}/httpGet/path": "/none",
            f"{probe}/periodSeconds": 1,
            f"{probe}/failureThreshold": 2,
            # One that was ready for a moment would stand in for another.
            "readinessProbe/httpGet/path": "/none",
        }.items()
    ]
    wrong = {"patches": [{"target": {"kind": "Deployment", "name": GATEWAY}, "patch": json.dumps(patch)}], **AT_ONCE}

    async def story() -> None:
        before = cluster.of(GATEWAY)
        cluster.apply(rendered(**wrong))
        (pod,) = (pod for pod in cluster.of(GATEWAY) if pod not in before)
        await cluster.until(lambda: pod.restarts == 1, 60)
        assert f"its {probe} fails" in str(pod.told)
        assert [one for one in before if one.ending] == []
        cluster.apply(rendered())
        assert pod.ending
        assert cluster.of(GATEWAY) == before
        await cluster.until(lambda: pod.gone, 60)

    play(story())


def test_the_variables_of_a_service_are_told_of_and_are_no_settings(
    cluster: Cluster, rendered: Rendered, play: Play
) -> None:
    patch = [{"op": "replace", "path": "/spec/template/spec/enableServiceLinks", "value": True}]
    linked = rendered(
        patches=[{"target": {"kind": "Deployment", "name": GATEWAY}, "patch": json.dumps(patch)}], **AT_ONCE
    )
    service = copy.deepcopy(named(linked, "Service", GATEWAY))
    service["metadata"]["name"] = "gateway"

    async def story() -> None:
        before = cluster.of(GATEWAY)
        cluster.apply([service, *linked])
        (pod,) = (pod for pod in cluster.of(GATEWAY) if pod not in before)
        await cluster.until(lambda: pod.ready, 60)
        assert pod.container is not None
        told = (await cluster.engine.log(pod.container)).partition("listening on http://0.0.0.0:9000")[0]
        assert "variables of a Kubernetes Service named gateway (GATEWAY_PORT=tcp://10.96." in told
        assert "set enableServiceLinks: false" in told
        cluster.apply(rendered())
        await cluster.until(lambda: pod.gone, 60)

    play(story())


def test_a_second_vllm_on_another_node_does_not_get_the_volume_of_one(cluster: Cluster, play: Play) -> None:
    async def story() -> None:
        (first,) = cluster.of(VLLM)
        cluster.scale(VLLM, 2)
        (second,) = (pod for pod in cluster.of(VLLM) if pod is not first)
        await cluster.until(lambda: "Multi-Attach error" in second.why, 30)
        cluster.scale(VLLM, 1)
        await cluster.until(lambda: second.gone, 30)
        assert cluster.of(VLLM) == [first]

    play(story())


def scaled(rendered: Rendered, *literals: str) -> list[dict[str, object]]:
    """With components/autoscaling, by which vLLM's pods share a volume, and one comes before another goes."""
    return rendered(components=[AUTOSCALING], **settings(VLLM, *literals))


def test_a_rollout_of_vllm_loses_nothing_and_is_known_within_an_interval_and_a_second(
    cluster: Cluster, rendered: Rendered, play: Play, callers: Callers
) -> None:
    async def story() -> None:
        cluster.apply(scaled(rendered, "VLLM_MAX_NUM_SEQS=64"))
        cluster.scale(GATEWAY, 2)
        await settled(cluster)
        (old,) = cluster.of(VLLM)
        cluster.apply(scaled(rendered, "VLLM_MAX_NUM_SEQS=65"))
        (new,) = (pod for pod in cluster.of(VLLM) if pod is not old)
        # Until then the two cores are for its start; that it is ready is found some seconds later.
        await listens(new)
        async with callers.calling(10, (40, 120)), callers.calling(4, (2, 2)):
            await cluster.until(lambda: cluster.is_rolled_out(VLLM), 60)
            await cluster.until(lambda: old.gone, 160)
        assert callers.outcomes == {"answered": len(callers.calls)}
        assert ends_by_itself(old)
        came, went = new.when("ready"), old.when("is stopped")
        first = min(call.sent_at for call in callers.calls if call.upstream == hashed(new))
        last = max(call.sent_at for call in callers.calls if call.upstream == hashed(old))
        sys.stdout.write(f"first call of the new one: {first - came:.2f} s, last of the old: {last - went:.2f} s\n")
        assert first >= came
        assert first - came < KNOWN_WITHIN
        assert last - went < KNOWN_WITHIN
        # Answers ran on at the old one, through its preStop.
        assert any(call.upstream == hashed(old) and call.ended_at > went + 1 for call in callers.calls)

    play(story())


def test_a_vllm_that_never_gets_ready_has_no_call_and_stands_in_for_none(
    cluster: Cluster, rendered: Rendered, play: Play, callers: Callers
) -> None:
    async def story() -> None:
        (good,) = cluster.of(VLLM)
        async with callers.calling(4, (10, 20)):
            cluster.apply(scaled(rendered, "LLM_VLLM_MODEL_NAME=/data/none"))
            (bad,) = (pod for pod in cluster.of(VLLM) if pod is not good)
            await cluster.until(lambda: bad.why.startswith("CrashLoopBackOff"), 200)
            # What the document says to look for stands in its log.
            assert "/data/none" in str(bad.told)
            cluster.apply(scaled(rendered, "VLLM_MAX_NUM_SEQS=65"))
            await cluster.until(lambda: bad.gone, 60)
        assert cluster.of(VLLM) == [good]
        assert callers.outcomes == {"answered": len(callers.calls)}
        assert {call.upstream for call in callers.calls} == {hashed(good)}

    play(story())


def test_a_node_that_vanishes_breaks_what_runs_there_and_says_so(
    cluster: Cluster, play: Play, callers: Callers
) -> None:
    async def story() -> None:
        cluster.scale(VLLM, 2)
        await settled(cluster)
        node = cluster.of(VLLM)[0].node
        lost = {pod.owner: pod for pod in cluster.pods if pod.node == node}
        kept = {pod.owner: pod for pod in cluster.pods if pod.node != node}
        assert lost.keys() == kept.keys() == {GATEWAY, VLLM}
        gateway = kept[GATEWAY].address
        async with callers.calling(20, (40, 120)):
            await callers.until(lambda: len(callers.calls) >= 40)
            vanished_at = time.monotonic()
            await cluster.vanish(node)
            known_at = vanished_at + NODE_GRACE + SPREAD
            await callers.until(lambda: sum(call.sent_at > known_at for call in callers.calls) >= 60)
        later = [call for call in callers.calls if call.sent_at > known_at]
        assert {(call.gateway, call.upstream, call.outcome) for call in later} == {
            (gateway, hashed(kept[VLLM]), "answered")
        }
        # The gateway that is left had a few calls there, each of which was told so, and in time.
        broken = [call for call in callers.calls if call.gateway == gateway and call.outcome != "answered"]
        for call in broken:
            sys.stdout.write(f"{call.sent_at - vanished_at:.1f} to {call.ended_at - vanished_at:.1f}: {call.outcome}\n")
        assert broken
        assert all(tells(call) for call in broken)
        assert all(call.ended_at - max(call.sent_at, vanished_at) < MISSED_WITHIN + 5 for call in broken)
        # It found that out by itself, before the cluster did.
        assert max(call.sent_at for call in broken) - vanished_at < NODE_GRACE
        assert not [call for call in callers.calls if call.ended_at < vanished_at and call.outcome != "answered"]

    play(story())


def tells(call: Call) -> bool:
    return call.outcome.startswith(("error event: upstream_", "refused: 502", "refused: 503", "refused: 504"))
