"""TEI, Infinity, vLLM and Ollama: stand-ins that OpenAI's client can use, and dialects that know where they differ."""

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, replace

import msgspec
import numpy as np
import openai
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.domain import Space, Truncation
from app.errors import InputRefused, ProviderError
from app.providers.dialect import Dialect, Target
from app.providers.refusals import Answer
from app.providers.remote import RemoteProvider
from app.providers.self_hosted import VLLM, Infinity, Ollama, TextEmbeddingsInference
from tests.contract.tried import answered, understood
from tests.emulators import infinity, ollama, tei, vllm
from tests.emulators.cases import Case
from tests.emulators.infinity import InfinityEmulator
from tests.emulators.ollama import OllamaEmulator
from tests.emulators.self_hosted import SelfHosted
from tests.emulators.tei import TEIEmulator
from tests.emulators.vllm import VLLMEmulator
from tests.identity import identifying_vector, identifying_vectors
from tests.remote import remote

TEXTS = ["one", "two", "three"]
LONG = "word" + " word" * 600
HEAD = "word" + " word" * 511


@dataclass(frozen=True)
class Server:
    """A dialect and its stand-in; `prompt_tokens` is what the usage of TEXTS says, to a client and to us."""

    wire: type[Dialect]
    emulator: type[SelfHosted]
    prompt_tokens: int = 3
    believed_tokens: int | None = 3


SERVERS = {
    "tei": Server(TextEmbeddingsInference, TEIEmulator, believed_tokens=None),
    "infinity": Server(Infinity, InfinityEmulator, prompt_tokens=11, believed_tokens=None),
    "vllm": Server(VLLM, VLLMEmulator),
    "ollama": Server(Ollama, OllamaEmulator),
}


@pytest.fixture(params=list(SERVERS.values()), ids=list(SERVERS))
def server(request: pytest.FixtureRequest) -> Server:
    """Each of them in turn."""
    made: Server = request.param
    return made


@pytest.fixture
async def emulator(server: Server) -> AsyncIterator[SelfHosted]:
    """Its stand-in, on loopback."""
    async with server.emulator() as running:
        yield running


@pytest.fixture
async def client(emulator: SelfHosted) -> AsyncIterator[openai.AsyncOpenAI]:
    """OpenAI's client, which retries nothing."""
    key = emulator.api_key or "unused"
    async with openai.AsyncOpenAI(base_url=emulator.base_url, api_key=key, max_retries=0) as made:
        yield made


@pytest.fixture
async def provider(server: Server, emulator: SelfHosted) -> AsyncIterator[RemoteProvider]:
    """The dialect, pointed at the stand-in."""
    made = remote(server.wire, emulator.base_url, emulator.api_key, emulator.model)
    yield made
    await made.aclose()


def space_of(emulator: SelfHosted, truncation: Truncation = "none") -> Space:
    """The model's Space."""
    return Space(emulator.model, emulator.width, max_input_tokens=512, truncation=truncation)


# ── OpenAI's client ─────────────────────────────────────────────────────────────────────────────────────────────────


async def test_openais_client_gets_each_texts_own_vector(
    client: openai.AsyncOpenAI, emulator: SelfHosted, server: Server
) -> None:
    """By default and as floats, `data[i]` is the vector of input i, and the usage is as the server counts."""
    for encoding in (openai.omit, "float"):
        found = await client.embeddings.create(model=emulator.model, input=TEXTS, encoding_format=encoding)
        vectors = np.array([item.embedding for item in found.data], dtype="<f4")
        np.testing.assert_array_equal(vectors, identifying_vectors(TEXTS, emulator.model, 1536))
        assert (found.model, found.usage.prompt_tokens) == (emulator.model, server.prompt_tokens)


async def test_openais_client_gets_long_texts_cut_or_refused(client: openai.AsyncOpenAI, emulator: SelfHosted) -> None:
    """On the route that is like OpenAI's, vLLM refuses a long text, and the others cut it without a word."""
    if isinstance(emulator, VLLMEmulator):
        with pytest.raises(openai.BadRequestError, match="maximum context length is 512 tokens") as refused:
            await client.embeddings.create(model=emulator.model, input=LONG)
        assert (refused.value.param, refused.value.code) == ("input_tokens", "400")
        return
    found = await client.embeddings.create(model=emulator.model, input=LONG)
    np.testing.assert_array_equal(
        np.array(found.data[0].embedding, "<f4"), identifying_vector(HEAD, emulator.model, 1536)
    )


async def test_openais_client_gets_widths_as_each_server_makes_them(
    client: openai.AsyncOpenAI, emulator: SelfHosted
) -> None:
    """Infinity cuts without bringing back to unit length, vLLM refuses, the others do as OpenAI does."""
    if isinstance(emulator, VLLMEmulator):
        with pytest.raises(openai.BadRequestError, match="matryoshka"):
            await client.embeddings.create(model=emulator.model, input="one", dimensions=64)
        return
    found = await client.embeddings.create(model=emulator.model, input="one", dimensions=64)
    head = identifying_vector("one", emulator.model, 1536)[:64]
    norm = 1 if isinstance(emulator, InfinityEmulator) else np.linalg.norm(head)
    np.testing.assert_allclose(np.array(found.data[0].embedding, "<f4"), head / norm, rtol=1e-5)


async def test_token_ids_are_refused_or_read_in_another_vocabulary(
    client: openai.AsyncOpenAI, emulator: SelfHosted
) -> None:
    """Where ids are taken at all they are not the text that they are at OpenAI, without an error."""
    if isinstance(emulator, InfinityEmulator | OllamaEmulator):
        with pytest.raises(openai.APIStatusError) as refused:
            await client.embeddings.create(model=emulator.model, input=[[15339, 1917]])
        assert refused.value.status_code in (400, 422)
        return
    found = await client.embeddings.create(model=emulator.model, input=[[15339, 1917]])
    assert found.data[0].embedding != pytest.approx(identifying_vector("hello world", emulator.model, 1536))


@pytest.mark.parametrize(
    ("name", "asks", "raised", "words"),
    [
        ("tei", {"input": ["a", ""]}, openai.BadRequestError, "`inputs` cannot be empty"),
        (
            "tei",
            {"input": ["a"] * 64},
            openai.UnprocessableEntityError,
            "batch size 64 > maximum allowed batch size 32",
        ),
        ("tei", {"dimensions": 4000}, openai.UnprocessableEntityError, "`dimensions` should be smaller"),
        ("infinity", {"model": "foo"}, openai.BadRequestError, "Invalid model: foo"),
        ("infinity", {"input": ["a"] * 2049}, openai.UnprocessableEntityError, "at most 2048 items"),
        ("vllm", {"model": "foo"}, openai.NotFoundError, "The model `foo` does not exist."),
        ("ollama", {"input": []}, openai.BadRequestError, "invalid input"),
        ("ollama", {"input": [[1]]}, openai.BadRequestError, "invalid input type"),
        ("ollama", {"encoding_format": "X"}, openai.BadRequestError, "Supported values: ['float', 'base64']"),
        ("ollama", {"model": "foo"}, openai.NotFoundError, 'model "foo" not found, try pulling it first'),
    ],
)
async def test_openais_client_raises_its_own_errors(
    name: str, asks: Mapping[str, object], raised: type[openai.APIStatusError], words: str
) -> None:
    """What a server refuses on the route like OpenAI's is an error of the right class, in the server's words."""
    async with SERVERS[name].emulator() as emulator:
        key = emulator.api_key or "unused"
        async with openai.AsyncOpenAI(base_url=emulator.base_url, api_key=key, max_retries=0) as client:
            with pytest.raises(raised) as refused:
                await client.post("/embeddings", body={"model": emulator.model, "input": "a", **asks}, cast_to=object)
    assert words in str(orjson.loads(refused.value.response.content))


async def test_openais_client_is_told_that_its_key_is_wrong(client: openai.AsyncOpenAI, emulator: SelfHosted) -> None:
    """Whatever stands in the body, and nothing at all in TEI's; Ollama has a proxy for that."""
    emulator.api_key = "another"
    with pytest.raises(openai.AuthenticationError):
        await client.embeddings.create(model=emulator.model, input="a")


# ── the sheets ──────────────────────────────────────────────────────────────────────────────────────────────────────

ROWS = [(name, case) for name, module in (("tei", tei), ("infinity", infinity), ("vllm", vllm), ("ollama", ollama))
        for case in module.CASES]  # fmt: skip


@pytest.mark.parametrize(("name", "case"), ROWS, ids=[f"{name} {case.row}" for name, case in ROWS])
async def test_each_row_of_the_sheets_is_answered_and_understood(name: str, case: Case) -> None:
    """The emulator answers it word for word, and the dialect knows what is to be done."""
    for trial in (answered, understood):
        async with SERVERS[name].emulator() as emulator:
            await trial(case, SERVERS[name].wire, emulator, emulator.model, {})


# ── the dialects ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "truncation", "path", "body"),
    [
        ("tei", "none", "/embed", {"inputs": TEXTS, "truncate": False}),
        ("tei", "end", "/embed", {"inputs": TEXTS, "truncate": True}),
        ("tei", "mean", "/embed", {"inputs": TEXTS, "truncate": False}),
        ("infinity", "none", "/embeddings", {"encoding_format": "base64", "input": TEXTS}),
        ("vllm", "none", "/v1/embeddings", {"encoding_format": "base64", "input": TEXTS}),
        ("vllm", "end", "/v1/embeddings",
         {"encoding_format": "base64", "input": TEXTS, "truncate_prompt_tokens": -1}),
        ("ollama", "none", "/api/embed", {"input": TEXTS, "truncate": False}),
        ("ollama", "end", "/api/embed", {"input": TEXTS, "truncate": True}),
    ],
)  # fmt: skip
async def test_only_what_is_needed_is_asked(
    name: str, truncation: Truncation, path: str, body: dict[str, object]
) -> None:
    """Each server is asked on the route where it can be told what becomes of long texts, if it has one."""
    server = SERVERS[name]
    async with server.emulator() as emulator:
        provider = remote(server.wire, emulator.base_url, emulator.api_key, emulator.model)
        reply = await provider.embed(TEXTS, space_of(emulator, truncation), timeout_s=10)
        await provider.aclose()
    (arrival,) = emulator.arrivals
    assert arrival.path == path
    assert arrival.body == (body if name == "tei" else {"model": emulator.model, **body})
    assert arrival.headers.get("authorization") == (f"Bearer {emulator.api_key}" if emulator.api_key else None)
    assert reply.tokens_billed == server.believed_tokens


async def test_a_long_text_is_cut_only_when_that_is_asked(provider: RemoteProvider, emulator: SelfHosted) -> None:
    """Asked to, every server cuts at the end; else it refuses, but for Infinity, of which that is known."""
    cut = await provider.embed([LONG], space_of(emulator, "end"), timeout_s=10)
    head = identifying_vectors([HEAD], emulator.model, 1536)
    np.testing.assert_array_equal(cut.vectors, head)
    if isinstance(emulator, InfinityEmulator):
        assert Infinity.cuts_silently
        np.testing.assert_array_equal((await provider.embed([LONG], space_of(emulator), timeout_s=10)).vectors, head)
        return
    with pytest.raises(InputRefused) as refused:
        await provider.embed(["short", LONG], space_of(emulator), timeout_s=10)
    assert refused.value.too_long


async def test_the_prompt_stands_in_front_of_the_text(provider: RemoteProvider, emulator: SelfHosted) -> None:
    """None of them knows the prompts of its model, so they are sent."""
    space = replace(space_of(emulator), input_type="query", prompt="query: ")
    reply = await provider.embed(TEXTS, space, timeout_s=10)
    expected = identifying_vectors([f"query: {text}" for text in TEXTS], emulator.model, 1536)
    np.testing.assert_array_equal(reply.vectors, expected)


# ── what no server should say ───────────────────────────────────────────────────────────────────────────────────────

_words = st.sampled_from(["error", "message", "code", "type", "detail", "data", "embeddings", "embedding", "usage"])
_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_words, inner, max_size=3),
    max_leaves=9,
)
_nested = st.sampled_from([b"[" * 2000, b'{"error":{"message":' + b"[" * 900 + b"]" * 900 + b"}}"])
_bodies = st.binary(max_size=40) | _json.map(msgspec.json.encode) | _nested
_dialects = st.sampled_from([server.wire for server in SERVERS.values()])


@given(_dialects, st.sampled_from([300, 400, 401, 404, 413, 418, 422, 424, 429, 500, 501, 503]), _bodies)
def test_whatever_stands_in_an_error_it_has_a_meaning(wire: type[Dialect], status: int, body: bytes) -> None:
    """No body makes a refusal raise."""
    assert isinstance(wire(Target("model")).refusal(Answer(status, {}, bytearray(body))), ProviderError)


@given(_dialects, _bodies)
def test_whatever_stands_in_a_reply_it_is_read_or_malformed(wire: type[Dialect], body: bytes) -> None:
    """No body makes reading raise anything but what is known to be malformed."""
    try:
        said = wire(Target("model")).read(bytearray(body))
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return
    assert len(said.embeddings) == len(said.places)
