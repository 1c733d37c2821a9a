"""The engine as a whole, in virtual time, over scripted deployments: batching, fallback, retries, deadlines, joins."""

import asyncio
import math
from collections import Counter

import numpy as np
import pytest

from app.domain import (
    ANONYMOUS,
    Attempts,
    Basket,
    Deployment,
    EmbeddingRequest,
    Limits,
    Priority,
    Space,
    Tenant,
    Vector,
)
from app.engine.workqueue import QueueBound
from app.errors import (
    BadCredential,
    DeadlineExceeded,
    EmbedgateError,
    InputRefused,
    InternalError,
    InvalidRequest,
    Misconfigured,
    Overloaded,
    ProviderUnavailable,
    QuotaExhausted,
    RejectedInput,
    Throttled,
    Transient,
    UnknownModel,
    Unreachable,
    UpstreamFailed,
)
from app.storage.memory import MemoryCache
from tests.identity import identifying_vector
from tests.rig import MODEL, WIDTH, Notebook, Rig, ScriptedProvider, bend, engine

pytestmark = pytest.mark.looptime
DOWN = Transient("status 500")


def now() -> float:
    """The virtual time."""
    return asyncio.get_running_loop().time()


async def all_of(*asking: object) -> list[object]:
    """What each of several callers got, errors included."""
    return await asyncio.gather(*asking, return_exceptions=True)  # type: ignore[call-overload, no-any-return]


# ── batching ────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_lone_text_of_an_idle_service_goes_at_once() -> None:
    """Idle adds no wait: the answer comes after exactly one provider call."""
    async with engine(ScriptedProvider(latency_s=0.05)) as rig:
        started = now()
        result = await rig.ask("hello")
        assert now() - started == pytest.approx(0.05)
        assert (result.queue_s, result.batch_items, result.deployments) == (0.0, 1, ("d0",))


async def test_texts_of_all_callers_gather_while_a_call_is_in_flight() -> None:
    """What arrives while the only slot is busy leaves as one batch when it comes free."""
    async with engine(ScriptedProvider(), limits=Limits(max_in_flight=1)) as rig:
        first = asyncio.ensure_future(rig.ask("first"))
        await asyncio.sleep(0.01)
        await all_of(first, *(rig.ask(f"later {at}", tenant=Tenant(f"t{at % 5}")) for at in range(50)))
        assert [len(texts) for _, texts in rig.provider.calls] == [1, 50]


async def test_a_free_slot_waits_for_company_no_longer_than_the_window() -> None:
    """With calls in flight, a batch leaves when its oldest text has waited `window_ms`."""
    limits = Limits(max_in_flight=4, window_s=0.005)
    async with engine(ScriptedProvider(), limits=limits) as rig:
        async with asyncio.TaskGroup() as callers:
            callers.create_task(rig.ask("first"))
            await asyncio.sleep(0.001)
            started = now()
            for at in range(8):
                callers.create_task(rig.ask(f"later {at}"))
                await asyncio.sleep(0.001)
        calls = rig.provider.calls
        assert calls[1][0] - started == pytest.approx(0.005, abs=1e-6)
        assert 'embedgate_flushes_total{deployment="d0",reason="idle"} 1.0' in rig.metrics()
        assert 'embedgate_flushes_total{deployment="d0",reason="window"} 2.0' in rig.metrics()
        assert 4 <= len(calls[1][1]) <= 6


async def test_a_full_batch_does_not_wait_for_the_window() -> None:
    """Enough company ends the wait."""
    limits = Limits(max_in_flight=4, window_s=10.0, max_batch_items=3)
    async with engine(ScriptedProvider(), limits=limits) as rig:
        await all_of(*(rig.ask(f"t{at}") for at in range(4)))
        assert now() < 1.0
        assert [len(texts) for _, texts in rig.provider.calls] == [3, 1]


async def test_no_batch_exceeds_its_deployments_limits() -> None:
    """Items, tokens and bytes of every call stay within what the deployment takes."""
    limits = Limits(max_in_flight=2, max_batch_items=7, max_batch_tokens=20, max_batch_bytes=90)
    async with engine(ScriptedProvider(), limits=limits) as rig:
        texts = [" ".join(f"w{at}" for _ in range(1 + at % 5)) for at in range(100)]
        await rig.ask(*texts)
        assert sorted(map(str, rig.provider.texts)) == sorted(texts)
        for _, batch in rig.provider.calls:
            assert len(batch) <= 7
            assert sum(len(str(text).split()) for text in batch) <= 20
            assert sum(len(str(text).encode()) for text in batch) <= 90


async def test_the_largest_request_is_split_and_joined_in_order() -> None:
    """2,048 texts travel in as many calls as the deployment needs and come back in order."""
    async with engine(ScriptedProvider(), limits=Limits(max_in_flight=3, max_batch_items=100)) as rig:
        result = await rig.ask(*(f"text {at}" for at in range(2048)))
        assert len(rig.provider.calls) == 21
        assert result.tokens == 4096


async def test_a_provider_that_answers_dearly_is_asked_for_fewer_vectors() -> None:
    """The batch also keeps to what the dialect says is worth asking for now."""
    async with engine(ScriptedProvider(max_items=10)) as rig:
        await rig.ask(*(f"t{at}" for at in range(25)))
        assert max(len(texts) for _, texts in rig.provider.calls) == 10


async def test_slots_are_never_exceeded() -> None:
    """However many wait, at most `max_in_flight` calls are out."""
    async with engine(ScriptedProvider(), limits=Limits(max_in_flight=3, max_batch_items=2)) as rig:
        await all_of(*(rig.ask(f"t{at}") for at in range(60)))
        assert rig.provider.most_in_flight == 3


async def test_bulk_leaves_a_quarter_of_the_slots_to_recent_interactive_callers() -> None:
    """While interactive texts came lately, one of four slots stays free of bulk; later bulk has them all."""
    async with engine(ScriptedProvider(latency_s=1.0), limits=Limits(max_in_flight=4, max_batch_items=1)) as rig:
        await rig.ask("hello", priority=Priority.INTERACTIVE)
        bulk = asyncio.gather(*(rig.ask(f"b{at}", priority=Priority.BULK, within_s=99) for at in range(60)))
        await asyncio.sleep(0.5)
        assert rig.provider.in_flight == 3
        started = now()
        await rig.ask("again", priority=Priority.INTERACTIVE)
        assert now() - started == pytest.approx(1.0, abs=0.01)
        await asyncio.sleep(12.0)
        assert rig.provider.in_flight == 4
        await bulk


# ── paid once ───────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_the_same_text_in_flight_is_bought_once() -> None:
    """Fifty callers of one text cause one purchase; each gets the vector, one is told that it paid."""
    async with engine(ScriptedProvider()) as rig:
        results = await asyncio.gather(*(rig.ask("same") for _ in range(50)))
        assert rig.provider.texts == ["same"]
        assert sum(result.joined for result in results) == 49


async def test_repeated_texts_of_one_request_are_bought_once() -> None:
    """Duplicates inside a request share a call and still get an answer each."""
    async with engine(ScriptedProvider()) as rig:
        result = await rig.ask("a", "b", "a", "a")
        assert sorted(map(str, rig.provider.texts)) == ["a", "b"]
        assert (result.cache_hits, result.joined, result.tokens) == (0, 2, 4)


async def test_what_was_bought_elsewhere_is_as_good_as_kept_and_is_no_saving() -> None:
    """By the keys that were told for it; only what nobody had is bought, and what was paid for was not spared."""
    notebook = Notebook()
    async with engine(ScriptedProvider(), ledger=notebook) as rig:
        request = EmbeddingRequest(ANONYMOUS, MODEL, ("a b", "c"), now() + 30.0)
        _, missing = await rig.gateway.missing(request)
        made = {key: Vector(identifying_vector(str(each.payload), MODEL, WIDTH).tobytes(), each.tokens)
                for key, each in missing.items()}  # fmt: skip
        first = next(iter(made))
        result = await rig.gateway.embed(request, Basket({first: made[first]}))
        assert (result.vectors, rig.provider.texts) == ([each.data for each in made.values()], ["c"])
        await rig.gateway.embed(request, Basket(made))
        assert (notebook.hits, notebook.joined, notebook.tokens) == (0, 0, 0)
        assert rig.provider.texts == ["c"]
        await rig.ask("c", "a b")
        assert rig.provider.texts == ["c", "a b"]


async def test_a_list_with_some_hits_buys_only_the_misses() -> None:
    """Per text, not per request."""
    async with engine(ScriptedProvider()) as rig:
        await rig.ask("a", "c")
        result = await rig.ask("a", "b", "c", "d")
        assert rig.provider.calls[1][1] == ["b", "d"]
        assert (result.cache_hits, result.joined) == (2, 0)


async def test_a_hit_needs_no_provider_at_all() -> None:
    """With every deployment out, what is cached still answers at once."""
    async with engine(ScriptedProvider()) as rig:
        await rig.ask("kept")
        rig.provider.always = BadCredential("status 401")
        with pytest.raises(UpstreamFailed):
            await rig.ask("other")
        result = await rig.ask("kept")
        assert (result.cache_hits, result.deployments) == (1, ())


async def test_a_failed_text_is_not_remembered_as_failed() -> None:
    """No negative caching: the next caller causes a new call."""
    async with engine(ScriptedProvider(poison=frozenset({"bad"}), refusal=InputRefused("status 400"))) as rig:
        with pytest.raises(RejectedInput):
            await rig.ask("bad")
        rig.provider.poison = frozenset()
        await rig.ask("bad")


@pytest.mark.parametrize("cached", [True, False])
async def test_who_wants_each_text_gets_all_that_can_be_had(cached: bool) -> None:
    """One refused text does not stop the others; with the error they are in the basket, and are not bought again."""
    texts = tuple("bad" if number == 7 else f"text {number}" for number in range(40))
    provider = ScriptedProvider(poison=frozenset({"bad"}), refusal=InputRefused("status 400"))
    notebook = Notebook()
    async with engine(provider, ledger=notebook, cache=MemoryCache(1 << 24 if cached else 0)) as rig:
        request, basket = EmbeddingRequest(ANONYMOUS, MODEL, texts, now() + 60.0), Basket(each=True)
        with pytest.raises(RejectedInput) as refused:
            await rig.gateway.embed(request, basket)
        assert (refused.value.position, basket.texts, len(basket.vectors)) == (7, 39, 39)
        good_calls = [sent for _, sent in provider.calls if {*sent} <= {*texts} - {"bad"}]
        assert basket.calls == pytest.approx(len(good_calls))
        answers = Counter(provider.texts)
        good = EmbeddingRequest(ANONYMOUS, MODEL, texts[:7] + texts[8:], now() + 60.0)
        result = await rig.gateway.embed(good, basket)
        assert result.vectors == [identifying_vector(text, MODEL, WIDTH).tobytes() for text in good.texts]
        assert (result.calls, Counter(provider.texts)) == (0, answers)
        assert notebook.hits == 0


async def test_a_joined_text_takes_the_higher_priority() -> None:
    """A bulk text that an interactive caller also wants leaves before other bulk."""
    async with engine(ScriptedProvider(), limits=Limits(max_in_flight=1, max_batch_items=1)) as rig:
        async with asyncio.TaskGroup() as callers:
            callers.create_task(rig.ask("busy"))
            await asyncio.sleep(0.01)
            for at in range(5):
                callers.create_task(rig.ask(f"bulk {at}", priority=Priority.BULK))
            await asyncio.sleep(0.01)
            callers.create_task(rig.ask("bulk 4", priority=Priority.INTERACTIVE))
        assert rig.provider.texts[1] == "bulk 4"
        assert sorted(map(str, rig.provider.texts)) == sorted({"busy", *(f"bulk {at}" for at in range(5))})


class Invalidated(MemoryCache):
    """A cache whose operator can declare all of it void."""

    mark = b""

    def base(self, space: Space) -> bytes:
        """What the operator said last."""
        return self.mark


async def test_what_was_invalidated_is_bought_again() -> None:
    """Also a text in flight at that moment: who asks afterwards does not get what was begun before."""
    cache = Invalidated(1 << 20)
    async with engine(ScriptedProvider(), cache=cache) as rig:
        await rig.ask("kept")
        flying = asyncio.ensure_future(rig.ask("flying"))
        await asyncio.sleep(0.01)
        cache.mark = b"2"
        again = await rig.ask("kept", "flying")
        assert (again.cache_hits, again.joined) == (0, 0)
        await flying
        assert (await rig.ask("kept", "flying")).cache_hits == 2


async def test_only_tenants_of_one_group_share_what_was_bought() -> None:
    """Neither the cache nor a text in flight tells one group what another has asked; within a group both are shared."""
    async with engine(ScriptedProvider()) as rig:
        tenants = [
            Tenant(name, cache_group=group) for name, group in zip("abcde", ["", "", "g", "g", "h"], strict=True)
        ]
        flying = await asyncio.gather(*(rig.ask("same", tenant=tenant) for tenant in tenants))
        assert [result.joined for result in flying] == [0, 1, 0, 1, 0]
        assert rig.provider.texts == ["same"] * 3
        for tenant in tenants:
            assert (await rig.ask("same", tenant=tenant)).cache_hits == 1
        assert (await rig.ask("same", tenant=Tenant("f", cache_group="i"))).cache_hits == 0


async def test_keys_of_many_groups_fill_no_memory() -> None:
    """What is remembered to make keys quickly is bounded, and forgetting it changes no key."""
    async with engine(ScriptedProvider(), cache=MemoryCache(1 << 24)) as rig:
        await rig.ask("a", tenant=Tenant("t", cache_group="first"))
        for number in range(2000):
            await rig.ask("a", tenant=Tenant("t", cache_group=str(number)))
        assert len(rig.gateway._shelf._keys._seeds) <= 1024
        assert (await rig.ask("a", tenant=Tenant("t", cache_group="first"))).cache_hits == 1


async def test_smaller_dimensions_share_one_purchase() -> None:
    """Sizes of a Matryoshka model are cut from the full vector and normalised again."""
    async with engine(ScriptedProvider(), cuts_dimensions=True) as rig:
        full, half = await asyncio.gather(rig.ask("a"), rig.ask("a", dimensions=WIDTH // 2))
        assert rig.provider.texts == ["a"]
        cut = np.frombuffer(full.vectors[0], "<f4")[: WIDTH // 2].astype(np.float64)
        expected = cut / np.linalg.norm(cut)
        assert np.allclose(np.frombuffer(half.vectors[0], "<f4"), expected, atol=1e-7)


async def test_input_types_with_prompts_are_different_spaces() -> None:
    """A query and a document of the same words share neither call nor cache entry."""
    async with engine(ScriptedProvider(), prompts=(("query", "query: "), ("document", "doc: "))) as rig:
        query = await rig.ask("words", input_type="query")
        document = await rig.ask("words", input_type="document")
        plain = await rig.ask("words")
        assert len({query.space.id, document.space.id, plain.space.id}) == 3
        assert len({query.vectors[0], document.vectors[0], plain.vectors[0]}) == 3
        assert len(rig.provider.calls) == 3


async def test_token_ids_become_text_for_deployments_with_another_vocabulary() -> None:
    """Ids and the text that they stand for get the same vector and share one purchase."""
    async with engine(ScriptedProvider()) as rig:
        as_text = await rig.ask("w1 w2 w3")
        as_ids = await rig.ask((1, 2, 3))
        assert as_text.vectors == as_ids.vectors
        assert as_ids.cache_hits == 1


async def test_token_ids_become_text_where_a_prompt_stands_in_front() -> None:
    """Nobody puts a prompt in front of ids, so that a query given as ids is the query given as text."""
    deployment = Deployment("", MODEL, takes_token_ids=True)
    async with engine(ScriptedProvider(), deployment=deployment, prompts=(("query", "ask: "),)) as rig:
        by_ids = await rig.ask((1, 2), input_type="query")
        assert rig.provider.texts == ["w1 w2"]
        assert (await rig.ask("w1 w2", input_type="query")).vectors == by_ids.vectors
        await rig.gateway.embed(EmbeddingRequest(ANONYMOUS, MODEL, ((1, 2),), now() + 10))
        assert rig.provider.texts[-1] == (1, 2)


# ── what is refused ─────────────────────────────────────────────────────────────────────────────────────────────────


async def test_an_unknown_or_forbidden_model_looks_the_same() -> None:
    """The caller cannot tell a model that is not its own from one that does not exist."""
    async with engine(ScriptedProvider()) as rig:
        with pytest.raises(UnknownModel) as unknown:
            await rig.ask("a", model="nope")
        with pytest.raises(UnknownModel) as forbidden:
            await rig.ask("a", tenant=Tenant("t", models=frozenset({"nope"})))
        assert str(unknown.value).replace("nope", MODEL) == str(forbidden.value)


async def test_a_text_that_is_too_long_is_refused_with_its_length() -> None:
    """The wording that clients parse, with both numbers; nothing is sent."""
    async with engine(ScriptedProvider(), max_input_tokens=10) as rig:
        with pytest.raises(
            InvalidRequest, match=r"maximum context length is 10 tokens, however you requested 12 tokens"
        ):
            await rig.ask("ok", "w " * 12)
        assert rig.provider.calls == []


async def test_truncate_end_cuts_what_is_too_long() -> None:
    """On request the head that fits is embedded, in a Space of its own."""
    async with engine(ScriptedProvider(), max_input_tokens=3) as rig:
        result = await rig.ask("one two three four", truncation="end")
        assert rig.provider.texts == ["one two three"]
        assert result.tokens == 3
        assert result.space.truncation == "end"


async def test_a_request_of_too_many_tokens_is_refused() -> None:
    """The sum over all texts is bounded, hits included."""
    async with engine(ScriptedProvider(), max_input_tokens=10_000) as rig:
        for at in range(40):
            await rig.ask(f"{at} " * 8000)
        with pytest.raises(InvalidRequest, match=r"Requested 320000 tokens, max 300000 tokens per request") as refused:
            await rig.ask(*(f"{at} " * 8000 for at in range(40)))
        assert (refused.value.kind, refused.value.code) == ("max_tokens_per_request",) * 2


async def test_every_repetition_of_a_text_counts_towards_the_total() -> None:
    """The limit is on what was asked, not on what has to be bought."""
    async with engine(ScriptedProvider(), max_input_tokens=10_000) as rig:
        with pytest.raises(InvalidRequest, match=r"Requested 320000 tokens"):
            await rig.ask(*["w " * 8000] * 40)
        assert rig.provider.calls == []


@pytest.mark.parametrize(
    ("dimensions", "code"), [(0, "integer_below_min_value"), (WIDTH + 1, "integer_above_max_value")]
)
async def test_dimensions_out_of_range_are_refused(dimensions: int, code: str) -> None:
    """Never ignored, never clipped."""
    async with engine(ScriptedProvider(), cuts_dimensions=True) as rig:
        with pytest.raises(InvalidRequest) as refused:
            await rig.ask("a", dimensions=dimensions)
        assert (refused.value.param, refused.value.code) == ("dimensions", code)


async def test_a_full_queue_refuses_the_whole_request() -> None:
    """503 with a wait, and what was admitted before is not harmed."""
    bound = QueueBound(max_items=5)
    async with engine(ScriptedProvider(), limits=Limits(max_in_flight=1), bound=bound) as rig:
        async with asyncio.TaskGroup() as callers:
            callers.create_task(rig.ask("flying"))
            await asyncio.sleep(0.01)
            callers.create_task(rig.ask(*"abcde"))
            await asyncio.sleep(0.01)
            with pytest.raises(Overloaded):
                await rig.ask("f")
            joined = callers.create_task(rig.ask("a"))
        assert joined.result().joined == 1


# ── failures ────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_failed_batch_goes_to_the_next_deployment_at_once() -> None:
    """The caller sees one answer, from the second deployment, without a back-off."""
    async with engine(ScriptedProvider(always=DOWN), ScriptedProvider()) as rig:
        started = now()
        result = await rig.ask("a")
        assert now() - started == pytest.approx(0.1)
        assert result.deployments == ("d1",)


async def test_a_lone_deployment_is_tried_again_after_a_back_off() -> None:
    """Full jitter: each pause is random, at most base · 2ⁿ, and three tries are all."""
    deployment = Deployment("", MODEL, attempts=Attempts(3, backoff_base_s=1.0, backoff_cap_s=32.0))
    async with engine(ScriptedProvider(always=DOWN), deployment=deployment) as rig:
        with pytest.raises(UpstreamFailed) as failed:
            await rig.ask("a", within_s=100)
        assert failed.value.code == "upstream_error"
        times = [at for at, _ in rig.provider.calls]
        assert len(times) == 3
        assert 0.05 < times[1] - times[0] <= 0.05 + 1.0
        assert 0.05 < times[2] - times[1] <= 0.05 + 2.0


async def test_back_off_is_jittered() -> None:
    """Two texts that failed at the same moment do not come back at the same moment."""
    pauses = set()
    async with engine(ScriptedProvider(), limits=Limits(max_in_flight=8, max_batch_items=1)) as rig:
        rig.provider.script.extend([DOWN] * 4)
        await all_of(*(rig.ask(f"t{at}", within_s=100) for at in range(4)))
        pauses = {round(at, 4) for at, _ in rig.provider.calls[4:]}
    assert len(pauses) == 4


async def test_retries_have_a_budget() -> None:
    """At 100 % failures, attempts stay within 1.1 × requests + 10."""
    deployment = Deployment("", MODEL, limits=Limits(max_in_flight=64, max_batch_items=1))
    async with engine(ScriptedProvider(always=DOWN), deployment=deployment) as rig:
        for wave in range(40):
            await all_of(*(rig.ask(f"{wave} {at}", within_s=5) for at in range(10)))
        assert len(rig.provider.calls) <= 1.1 * 400 + 10


async def test_a_429_pauses_the_deployment_as_long_as_it_says() -> None:
    """`Retry-After` is honoured, the breaker does not move, and the caller only waits."""
    async with engine(ScriptedProvider()) as rig:
        rig.provider.script.append(Throttled("status 429", retry_after_s=3.0))
        await rig.ask("a")
        first, second = (at for at, _ in rig.provider.calls)
        assert second - first >= 3.0
        assert second - first < 3.6
        assert rig.gates["d0"].breaker.state == "closed"


@pytest.mark.parametrize("size", [2, 7, 64, 256])
async def test_a_refused_batch_is_split_until_only_the_bad_text_fails(size: int) -> None:
    """One poison text among many costs at most 2·log2(n)+1 extra calls, and its neighbours get their vectors."""
    bad = "poison"
    provider = ScriptedProvider(poison=frozenset({bad}), refusal=InputRefused("status 400"))
    async with engine(provider, limits=Limits(max_in_flight=1)) as rig:
        warm = asyncio.ensure_future(rig.ask("warm"))
        await asyncio.sleep(0.01)
        outcomes = await all_of(*(rig.ask(bad if at == size // 3 else f"t{at}") for at in range(size)), warm)
        errors = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
        assert [type(error) for error in errors] == [RejectedInput]
        extra = len(provider.calls) - 2
        assert extra <= 2 * math.ceil(math.log2(size)) + 1
        assert rig.gates["d0"].breaker.state == "closed"


@pytest.mark.parametrize(
    "twist",
    [
        bend(lambda v: v[:-1]),
        bend(lambda v: np.vstack([v, v[:1]])),
        bend(lambda v: v[:, :-1]),
        bend(lambda v: v * np.float32(np.nan)),
        bend(lambda v: v * np.float32(np.inf)),
        bend(lambda v: v * np.float32(0.0)),
    ],
    ids=["short", "long", "narrow", "nan", "infinite", "zero"],
)
async def test_a_malformed_reply_reaches_nobody(twist: object) -> None:
    """It is not stored, the next deployment answers, and without one it is a 502 that says so."""
    async with engine(ScriptedProvider(always=twist), ScriptedProvider()) as rig:  # type: ignore[arg-type]
        assert (await rig.ask("a", "b")).deployments == ("d1",)
    async with engine(ScriptedProvider(always=twist)) as rig:  # type: ignore[arg-type]
        with pytest.raises(UpstreamFailed) as failed:
            await rig.ask("a", within_s=100)
        assert failed.value.code == "invalid_upstream_response"
        rig.provider.always = None
        await asyncio.sleep(10)
        assert (await rig.ask("a")).cache_hits == 0


@pytest.mark.parametrize("error", [BadCredential("status 401"), QuotaExhausted("status 429")])
async def test_a_deployment_without_credit_or_key_is_left_alone_at_once(error: EmbedgateError) -> None:
    """One refusal is enough; the fallback serves everything from then on."""
    async with engine(ScriptedProvider(always=error), ScriptedProvider()) as rig:  # type: ignore[arg-type]
        for at in range(10):
            await rig.ask(f"t{at}")
        assert len(rig.providers["d0"].calls) == 1
        assert rig.gates["d0"].breaker.state in ("credential", "quota")


async def test_a_misconfigured_deployment_is_not_tried_twice_for_a_text() -> None:
    """An unknown model upstream is the operator's to mend: the next deployment, or 502; the breaker does not move."""
    async with engine(ScriptedProvider(always=Misconfigured("status 404"))) as rig:
        with pytest.raises(UpstreamFailed):
            await rig.ask("a")
        assert len(rig.provider.calls) == 1
        assert rig.gates["d0"].breaker.state == "closed"


async def test_the_primary_is_used_again_when_it_heals() -> None:
    """A dead primary is probed by single texts and trusted again at the first success."""
    async with engine(ScriptedProvider(always=DOWN), ScriptedProvider(), limits=Limits(max_in_flight=8)) as rig:
        for at in range(40):
            await rig.ask(f"t{at}")
            await asyncio.sleep(0.1)
        dead = len(rig.providers["d0"].calls)
        assert dead <= 5 + 5
        rig.providers["d0"].always = None
        healed = now()
        at = 0
        while (await rig.ask(f"h{at}")).deployments != ("d0",):
            at += 1
            await asyncio.sleep(0.1)
        assert now() - healed <= 5.6
        assert rig.gates["d0"].breaker.state == "closed"


async def test_a_deployment_that_hangs_is_left_for_the_next() -> None:
    """Silence is a failure too: half of the time that is left, so that the fallback still fits."""
    async with engine(ScriptedProvider(always=1000.0), ScriptedProvider()) as rig:
        started = now()
        result = await rig.ask("a", within_s=4.0)
        assert result.deployments == ("d1",)
        assert now() - started <= 2.1
        assert rig.providers["d0"].timeouts_s[0] == pytest.approx(2.0)


async def test_a_stall_opens_the_breaker_although_all_slots_hang() -> None:
    """New callers do not wait for hung slots to time out."""
    limits = Limits(max_in_flight=2, max_batch_items=1)
    async with engine(ScriptedProvider(), ScriptedProvider(), limits=limits) as rig:
        for at in range(20):
            await rig.ask(f"ok {at}")
        rig.providers["d0"].always = 1000.0
        hung = asyncio.gather(*(rig.ask(f"hung {at}", within_s=60) for at in range(2)))
        await asyncio.sleep(0.01)
        started = now()
        assert (await rig.ask("new", within_s=60)).deployments == ("d1",)
        assert now() - started <= 1.2
        await hung


# ── deadlines, outages ──────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_caller_is_answered_at_its_deadline() -> None:
    """504 within 50 ms of the deadline; the text that nobody wants any more is never sent."""
    async with engine(ScriptedProvider(latency_s=3.0), limits=Limits(max_in_flight=1, max_batch_items=1)) as rig:
        busy = asyncio.ensure_future(rig.ask("busy"))
        await asyncio.sleep(0.1)
        started = now()
        with pytest.raises(DeadlineExceeded):
            await rig.ask("late", within_s=1.0)
        assert now() - started == pytest.approx(1.0, abs=0.05)
        await busy
        await asyncio.sleep(10)
        assert rig.provider.texts == ["busy"]


async def test_an_outage_is_told_at_once_to_who_cannot_wait_for_the_probe() -> None:
    """503 with the probe's time when the deadline lies before it; who can wait flies when the probe succeeds."""
    async with engine(ScriptedProvider(always=DOWN)) as rig:
        for at in range(4):
            with pytest.raises((UpstreamFailed, ProviderUnavailable)):
                await rig.ask(f"t{at}", within_s=20)
        while rig.gates["d0"].breaker.retry_in_s() < 0.5:
            with pytest.raises((UpstreamFailed, ProviderUnavailable)):
                await rig.ask(f"u{now()}", within_s=3)
        started = now()
        with pytest.raises(ProviderUnavailable) as refused:
            await rig.ask("hasty", within_s=0.4)
        assert now() - started <= 0.02
        assert refused.value.retry_after_s == pytest.approx(rig.gates["d0"].breaker.retry_in_s(), abs=0.01)
        rig.provider.always = None
        await rig.ask("patient", within_s=20)


async def test_waiting_through_an_outage_ends_in_503_not_504() -> None:
    """At the deadline the caller learns that no provider was there, not that it was slow."""
    deployment = Deployment("", MODEL, attempts=Attempts(most=1))
    async with engine(ScriptedProvider(always=Unreachable("refused")), deployment=deployment) as rig:
        outcomes = []
        for wave in range(6):
            outcomes += await all_of(*(rig.ask(f"{wave} {at}", within_s=0.3) for at in range(3)))
        assert {type(outcome) for outcome in outcomes} <= {UpstreamFailed, ProviderUnavailable}
        assert any(isinstance(outcome, ProviderUnavailable) for outcome in outcomes)


# ── bugs ────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_bug_in_a_flight_fails_only_what_it_held() -> None:
    """An exception that nobody thought of is a 500 for its batch; the next batch flies."""
    async with engine(ScriptedProvider()) as rig:
        rig.provider.script.append(bend(lambda v: 1 // 0))  # type: ignore[arg-type, return-value]
        with pytest.raises(InternalError):
            await rig.ask("held")
        await rig.ask("next")
        assert 'embedgate_loop_crashes_total{loop="flight"} 1.0' in rig.metrics()
        assert rig.gateway.why_not_ready() == []


class Buggy:
    """Stands before a part of the engine and raises at the first `bugs` calls of the method `name`."""

    def __init__(self, inner: object, name: str, bugs: int) -> None:
        self._inner, self._name, self.bugs = inner, name, bugs

    def __getattr__(self, name: str) -> object:
        whole = getattr(self._inner, name)

        def buggy(*args: object, **named: object) -> object:
            if self.bugs:
                self.bugs -= 1
                raise RuntimeError("a bug")
            return whole(*args, **named)

        return buggy if name == self._name else whole

    def __len__(self) -> int:
        return len(self._inner)  # type: ignore[arg-type]


async def test_a_bug_in_the_batcher_loop_loses_nothing_that_waits() -> None:
    """The loop restarts and serves the text; the third bug in a minute turns readiness red."""
    async with engine(ScriptedProvider()) as rig:
        await rig.ask("before")
        (batcher,) = rig.gateway._batchers.values()
        calls = batcher.dispatcher._calls
        calls.limiter = Buggy(calls.limiter, "reserve", 3)  # type: ignore[assignment]
        await rig.ask("a")
        assert "3 crashes" in rig.gateway.why_not_ready()[0]
        await asyncio.sleep(61)
        assert rig.gateway.why_not_ready() == []
        assert rig.leftovers()["slots"] == 0


@pytest.mark.parametrize(("part", "method"), [("_telemetry", "batch_left"), ("_cache", "put_many"), ("queue", "take")])
async def test_a_bug_anywhere_in_the_loop_or_a_flight_fails_only_what_it_held(part: str, method: str) -> None:
    """Before, at and after the call; the next text is served, and no slot, entry or breaker is left behind."""
    async with engine(ScriptedProvider()) as rig:
        await rig.ask("before")
        (batcher,) = rig.gateway._batchers.values()
        setattr(batcher, part, Buggy(getattr(batcher, part), method, 1))
        started = now()
        if part == "queue":
            await rig.ask("held")  # nothing was taken yet, so nothing was lost
        else:
            with pytest.raises(InternalError):
                await rig.ask("held")
        assert now() - started < 1.0
        for at in range(20):
            await rig.ask(f"next {at}")
            await asyncio.sleep(1.0)
        assert rig.gates["d0"].breaker.state == "closed"
        assert set((await settle(rig)).values()) == {0}


async def test_a_bug_in_telling_of_a_bug_stops_nothing() -> None:
    """Supervision itself cannot be the thing that brings the service down."""
    async with engine(ScriptedProvider()) as rig:
        await rig.ask("before")
        (batcher,) = rig.gateway._batchers.values()
        batcher._cache = Buggy(batcher._cache, "put_many", 1)  # type: ignore[assignment]
        batcher._crashes._telemetry = Buggy(rig.telemetry, "loop_crashed", 1)  # type: ignore[assignment]
        with pytest.raises(InternalError):
            await rig.ask("held")
        await rig.ask("next")


# ── leaving ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def settle(rig: Rig) -> dict[str, int]:
    """What is left when everything in flight has landed."""
    await asyncio.sleep(30)
    return rig.leftovers()


async def test_a_caller_that_leaves_the_queue_costs_nothing_upstream() -> None:
    """Its text is dropped, counted, and its place is free."""
    async with engine(ScriptedProvider(latency_s=1.0), limits=Limits(max_in_flight=1)) as rig:
        busy = asyncio.ensure_future(rig.ask("busy"))
        await asyncio.sleep(0.1)
        leaver = asyncio.ensure_future(rig.ask("unwanted"))
        await asyncio.sleep(0.1)
        leaver.cancel()
        await busy
        assert set((await settle(rig)).values()) == {0}
        assert rig.provider.texts == ["busy"]


async def test_a_caller_that_leaves_does_not_cancel_what_others_share() -> None:
    """The first caller of a joined text leaves; the second still gets it from the one purchase."""
    async with engine(ScriptedProvider(latency_s=1.0)) as rig:
        first = asyncio.ensure_future(rig.ask("shared"))
        await asyncio.sleep(0.1)
        second = asyncio.ensure_future(rig.ask("shared"))
        await asyncio.sleep(0.1)
        first.cancel()
        await second
        assert rig.provider.texts == ["shared"]


async def test_what_flies_is_kept_although_its_caller_has_left() -> None:
    """It has been paid for."""
    async with engine(ScriptedProvider(latency_s=1.0)) as rig:
        leaver = asyncio.ensure_future(rig.ask("paid"))
        await asyncio.sleep(0.1)
        leaver.cancel()
        await asyncio.sleep(2)
        assert (await rig.ask("paid")).cache_hits == 1


@pytest.mark.parametrize("moment_s", [0.0, 0.001, 0.004, 0.02, 0.06, 0.11, 0.3, 0.7, 1.3])
async def test_a_cancellation_at_any_moment_leaves_nothing_behind(moment_s: float) -> None:
    """Queued, waiting for quota, gathering, in flight, backing off: no counter, slot, task or table entry is left."""
    limits = Limits(max_in_flight=2, max_batch_items=8, window_s=0.02, requests_per_minute=120, tokens_per_minute=2000)
    async with engine(ScriptedProvider(latency_s=0.1), limits=limits) as rig:
        rig.provider.script.extend([DOWN, Throttled("status 429", 0.5), None, DOWN])
        callers = [asyncio.ensure_future(rig.ask(f"t{at % 40}", f"u{at}")) for at in range(60)]
        await asyncio.sleep(moment_s)
        for at, caller in enumerate(callers):
            if at % 3:
                caller.cancel()
        await all_of(*callers)
        for caller in callers:
            assert caller.cancelled() or caller.exception() is None or isinstance(caller.exception(), EmbedgateError)
        assert set((await settle(rig)).values()) == {0}
        await asyncio.sleep(60)
        assert not [o for o in await all_of(*(rig.ask(f"after {at}") for at in range(50))) if isinstance(o, Exception)]
