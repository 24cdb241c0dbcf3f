"""The clients people already have, unmodified, over a real socket: LoRAX's, TGI's, Hugging Face's and OpenAI's."""

from __future__ import annotations

import asyncio
import shutil
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import uvicorn

from server.model.text import Text
from server.recipes import Merge

from .conftest import World, build

#: What the clients themselves do that is deprecated is not ours to mend.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

ANSWER = " world, how are you"


@dataclass
class Live:
    world: World
    url: str


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory, text: Text, empty_store: Path) -> Iterator[Live]:
    world = build(shutil.copytree(empty_store, tmp_path_factory.mktemp("live") / "store"), text)
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(world.app, log_config=None, ws="none", lifespan="off"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])), daemon=True)
    thread.start()
    world.add("support")
    yield Live(world, f"http://127.0.0.1:{listener.getsockname()[1]}")
    server.should_exit = True
    thread.join(10)
    listener.close()
    world.engine.stop()
    world.store.close()


def test_lorax_client(live: Live) -> None:
    lorax = pytest.importorskip("lorax")
    client = lorax.Client(live.url)
    response = client.generate("hello", adapter_id="support", max_new_tokens=30, return_k_alternatives=2)
    assert response.generated_text == ANSWER
    assert response.details.finish_reason.value == "eos_token"
    assert len(response.details.tokens[0].alternative_tokens) == 2
    assert live.world.last.adapters == (live.world.store.get("default", "support").digest,)
    streamed = list(client.generate_stream("hello", max_new_tokens=30, stop_sequences=[", how"]))
    assert streamed[-1].generated_text == " world, how"
    assert streamed[-1].details.finish_reason.value == "stop_sequence"


def test_lorax_client_merges(live: Live) -> None:
    lorax = pytest.importorskip("lorax")
    client = lorax.Client(live.url)
    digest = live.world.store.get("default", "support").digest
    merged = lorax.MergedAdapters(
        ids=["support", "support"],
        weights=[2.0, 0.3],
        merge_strategy="ties",
        density=0.2,
        majority_sign_method="total",
    )
    assert client.generate("hello", merged_adapters=merged, max_new_tokens=30).generated_text == ANSWER
    assert live.world.last.recipes == (Merge((digest, digest), (2.0, 0.3), "ties", 0.2, "total"),)
    plain = lorax.MergedAdapters(ids=["support"], weights=[1.0], density=0.0)
    assert list(client.generate_stream("hello", merged_adapters=plain, max_new_tokens=30))[-1].generated_text == ANSWER
    assert live.world.last.recipes == (Merge((digest,), (1.0,)),)


def test_lorax_client_classifies_and_embeds(live: Live) -> None:
    lorax = pytest.importorskip("lorax")
    live.world.add("mood", head={"task_type": "SEQ_CLS", "pooling": "last", "labels": ["no", "yes", "maybe"]})
    live.world.store.bind_user("default", "ann", "mood")
    client = lorax.Client(live.url, headers={"X-User-Id": "ann"})  # its classify and embed take no adapter
    assert [entity["label"] for entity in client.classify("hello").entities] == ["yes", "no", "maybe"]
    assert len(client.embed("hello").embeddings) == 3


def test_lorax_client_raises_its_own_errors(live: Live) -> None:
    lorax = pytest.importorskip("lorax")
    errors = pytest.importorskip("lorax.errors")
    client = lorax.Client(live.url)
    with pytest.raises(errors.ValidationError, match="must be <= 100"):
        client.generate("hello", max_new_tokens=1000)
    with pytest.raises(errors.NotFoundError, match="does not exist"):
        client.generate("hello", adapter_id="nope")


def test_text_generation_client(live: Live) -> None:
    tgi = pytest.importorskip("text_generation")
    client = tgi.Client(live.url)
    response = client.generate("hello", max_new_tokens=30, decoder_input_details=True, top_n_tokens=2)
    assert response.generated_text == ANSWER
    assert response.details.prefill[0].text
    assert len(response.details.top_tokens[0]) == 2
    text = "".join(event.token.text for event in client.generate_stream("hello", max_new_tokens=30))
    assert text == ANSWER + "</s>"


def test_text_generation_client_chats(live: Live) -> None:
    tgi = pytest.importorskip("text_generation")
    types = pytest.importorskip("text_generation.types")
    client = tgi.Client(live.url)
    messages = [types.Message(role="user", content="hello")]
    assert client.chat(messages, max_tokens=30).choices[0].message.content == ANSWER
    shown = ""
    for chunk in client.chat(messages, max_tokens=30, stream=True):
        shown += chunk.choices[0].delta.content
        if chunk.choices[0].finish_reason is not None:
            break  # 0.7.0 stumbles over the [DONE] that follows, also when it is TGI that sends it
    assert shown == ANSWER


def test_hugging_face_client(live: Live) -> None:
    hub = pytest.importorskip("huggingface_hub")
    client = hub.InferenceClient(base_url=live.url)
    assert client.text_generation("hello", max_new_tokens=30) == ANSWER
    detailed = client.text_generation("hello", max_new_tokens=30, details=True, adapter_id="support", stop=["how"])
    assert detailed.details.finish_reason == "stop_sequence"
    assert "".join(client.text_generation("hello", max_new_tokens=30, stream=True)) == ANSWER + "</s>"
    last = list(client.text_generation("hello", max_new_tokens=30, stream=True, details=True))[-1]
    assert (last.generated_text, last.details.finish_reason) == (ANSWER, "eos_token")
    chat = client.chat_completion([{"role": "user", "content": "hello"}], max_tokens=30)
    assert chat.choices[0].message.content == ANSWER


def test_openai_client(live: Live) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0)
    messages = [{"role": "user", "content": "hello"}]
    chat = client.chat.completions.create(model="support", messages=messages, logprobs=True, top_logprobs=2)
    assert chat.choices[0].message.content == ANSWER
    assert len(chat.choices[0].logprobs.content[0].top_logprobs) == 2
    chunks = list(
        client.chat.completions.create(model="tiny", messages=messages, stream=True, stream_options={"include_usage": True})
    )
    assert "".join(chunk.choices[0].delta.content for chunk in chunks if chunk.choices) == ANSWER
    assert chunks[-1].usage.total_tokens > 0
    assert client.completions.create(model="tiny", prompt="hello", max_tokens=30).choices[0].text == ANSWER
    assert [model.id for model in client.models.list()] == ["tiny", "support"]
    assert client.models.retrieve("support").id == "support"
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="nope", messages=messages)
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.UnprocessableEntityError):
        client.chat.completions.create(model="tiny", messages=messages, temperature=-1)
    client.close()


def test_disconnect_over_a_real_socket_cancels(live: Live) -> None:
    engine = live.world.engine
    engine.hold()
    body = b'{"inputs": "hello"}'
    head = f"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    before = len(engine.submitted)
    with socket.create_connection(("127.0.0.1", int(live.url.rpartition(":")[2]))) as connection:
        connection.sendall(head.encode() + body)
        engine.wait_until(lambda: len(engine.submitted) > before)
    engine.wait_until(lambda: live.world.last.id in engine.cancelled)
    engine.go()
