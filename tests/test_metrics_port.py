"""The metrics' own listener: the metrics and nothing else, for as long as it is open."""

from __future__ import annotations

import httpx
import pytest

from server.metrics import Metrics
from server.metrics_port import MetricsPort
from server.serving import bind


def test_it_serves_the_metrics_and_nothing_else() -> None:
    metrics = Metrics("base", 1)
    metrics.finished("success")
    with bind("127.0.0.1", 0) as listener, MetricsPort(listener, metrics):
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        shown = httpx.get(f"{url}/metrics")
        assert shown.status_code == 200
        assert 'adapterd_requests_total{outcome="success"} 1.0' in shown.text
        assert httpx.post(f"{url}/metrics").status_code == 405
        for path in ("/", "/health", "/adapters", "/generate", "/docs", "/debug/step"):
            assert httpx.get(url + path).status_code == 404
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/metrics")
