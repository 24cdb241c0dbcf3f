"""Health, readiness, info, metrics over HTTP, and the OpenAPI document."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from .conftest import World


async def test_health_follows_the_phase(world: World) -> None:
    assert (await world.http.get("/health")).status_code == 200
    assert (await world.http.get("/readyz")).json() == {"phase": "ready", "percent": 100.0}
    world.readiness.loading(40)
    sick = await world.http.get("/health")
    assert (sick.status_code, sick.json()) == (503, {"error": "unhealthy", "error_type": "healthcheck"})
    loading = await world.http.get("/readyz")
    assert (loading.status_code, loading.json()) == (503, {"phase": "loading", "percent": 40.0})
    world.readiness.draining()
    assert (await world.http.get("/readyz")).status_code == 503
    assert (await world.http.get("/livez")).status_code == 200


async def test_info(world: World) -> None:
    info = (await world.http.get("/info")).json()
    assert (info["model_id"], info["max_total_tokens"], info["max_stop_sequences"]) == ("tiny", 100, 4)
    assert (info["engine"]["kv_blocks_used"], info["engine"]["kv_blocks_total"]) == (3, 12)


async def test_metrics_tell_what_happened(world: World) -> None:
    await world.http.post("/adapters/nope/load")
    record = world.add("support")
    await world.http.post("/adapters/support/load")
    await world.generate(adapter_id="support", max_new_tokens=3)
    await world.generate(adapter_id="nope")
    await world.generate(temperature=-1)
    await world.http.post("/generate", content=b"{", headers={"content-type": "application/json"})
    response = await world.http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    samples = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }
    assert samples["adapterd_requests_total", ("outcome", "success")] == 1
    assert samples["adapterd_requests_total", ("outcome", "not_found")] == 1
    assert samples["adapterd_requests_total", ("outcome", "validation")] == 2
    labels = (("adapter", "support"), ("kind", "generated"), ("tenant", "default"))
    assert samples["adapterd_adapter_tokens_total", *labels] == 3
    assert samples[("adapterd_generated_tokens_total",)] == 3
    assert samples[("adapterd_inter_token_latency_seconds_count",)] == 2
    assert samples[("adapterd_time_to_first_token_seconds_count",)] == 1
    assert samples[("adapterd_queue_seconds_sum",)] == 0.25
    assert samples["vllm:kv_cache_usage_perc", ("engine", "0"), ("model_name", "tiny")] == 0.25
    info = next(key for key in samples if key[0] == "vllm:lora_requests_info")
    assert dict(info[1:]) == {"max_lora": "4", "running_lora_adapters": "support", "waiting_lora_adapters": ""}
    assert record.digest in world.engine.resident


async def test_docs_know_every_route_and_body(world: World) -> None:
    assert (await world.http.get("/docs")).status_code == 200
    document = (await world.http.get("/openapi.json")).json()
    for path in ("/generate", "/generate_stream", "/", "/v1/chat/completions", "/adapters", "/users/{user_id}", "/health"):
        assert path in document["paths"]
    defined = document["components"]["schemas"]
    for name in referenced(document):
        assert name in defined
    body = document["paths"]["/generate"]["post"]["requestBody"]["content"]["application/json"]
    assert body["schema"] == {"$ref": "#/components/schemas/GenerateRequest"}
    assert "a user" in body["examples"]
    assert {"200", "404", "413", "422", "424", "429", "503"} <= set(document["paths"]["/generate"]["post"]["responses"])


def referenced(node: object) -> set[str]:
    if isinstance(node, dict):
        own = {node["$ref"].rpartition("/")[2]} if isinstance(node.get("$ref"), str) else set()
        return own.union(*(referenced(value) for value in node.values()))
    if isinstance(node, list):
        return set().union(*(referenced(item) for item in node))
    return set()


async def test_step_times(world: World) -> None:
    found = (await world.http.get("/debug/step")).json()
    assert found["steps"] == found["remembered"] == found["decode"]["steps"] == 1
    assert found["decode"]["rows"] == 2
    assert (found["mixed"], found["last"]) == (None, [])
    (step,) = (await world.http.get("/debug/step", params={"last": 9})).json()["last"]
    assert step["ms"]["plan"] == step["total_ms"] > 0
    refused = await world.http.get("/debug/step", params={"last": 257})
    assert (refused.status_code, refused.json()["error_type"]) == (422, "validation")
