import asyncio
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app import vectors
from app.domain import ANONYMOUS, EmbeddingRequest, Space
from app.errors import CallTimeout, ConfigurationError, InputRefused
from app.providers.local import (
    DEVICES,
    Device,
    LocalModel,
    LocalModelFacts,
    Matrix,
    _runs,
    default_model,
    read_model,
)
from app.runtime import Runtime
from app.settings import load

FACTS = default_model()
SPACE = FACTS.space("all-MiniLM-L6-v2")
LONG = "word " * 1_000
MIXED = [f"{'a sentence of its own ' * n} number {n}" for n in (40, 1, 9, 0, 25, 3, 45, 2, 2, 14)]

Files = dict[str, Any]
SENTENCE_TRANSFORMERS: Files = {
    "modules.json": [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
    ],
    "1_Pooling/config.json": {
        "word_embedding_dimension": 384,
        "pooling_mode_cls_token": False,
        "pooling_mode_mean_tokens": True,
        "include_prompt": True,
    },
    "sentence_bert_config.json": {"max_seq_length": 256, "do_lower_case": False},
}


@pytest.fixture(scope="module")
def model() -> Iterator[LocalModel]:
    """The default model, loaded once: it belongs to no event loop."""
    made = LocalModel(FACTS)
    yield made
    asyncio.run(made.aclose())


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """The default model's two files in a directory of their own, and nothing beside them."""
    (tmp_path / "model.onnx").symlink_to(FACTS.onnx)
    shutil.copy(FACTS.tokenizer, tmp_path / "tokenizer.json")
    return tmp_path


def write(directory: Path, files: Files) -> Path:
    """Writes JSON files into `directory`."""
    for name, content in files.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(json.dumps(content))
    return directory


async def vector(facts: LocalModelFacts, text: str, space: Space | None = None, *, device: str = "auto") -> Matrix:
    """The vector of one text from a model of its own."""
    model = LocalModel(facts, device=device)
    try:
        reply = await model.embed([text], space or facts.space("m"), timeout_s=30)
    finally:
        await model.aclose()
    made: Matrix = reply.vectors[0]
    return made


# ── vectors ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_similar_sentences_are_near_and_others_far(model: LocalModel) -> None:
    """What means the same is near in words that are not the same, what does not is far."""
    texts = ["How do I reset my password?", "I forgot my login credentials", "The soup needs more salt"]
    same, like, other = (await model.embed(texts, SPACE, timeout_s=30)).vectors
    assert same @ like > 0.5
    assert abs(same @ other) < 0.2


async def test_the_vector_is_the_one_that_the_model_is_known_for(model: LocalModel) -> None:
    """Cosines measured with this ONNX file by a plain loop: pooling, special tokens and normalisation are right."""
    texts = ["The cat sat on the mat.", "A dog lay on the rug.", "Quarterly revenue fell by 3%."]
    made = (await model.embed(texts, SPACE, timeout_s=30)).vectors
    np.testing.assert_allclose([made[0] @ made[1], made[0] @ made[2]], [0.478, 0.005], atol=5e-3)


async def test_a_text_has_the_same_vector_alone_and_in_company(model: LocalModel) -> None:
    """Batch, padding and order change a vector by less than 1e-5 in any component."""
    together = (await model.embed(MIXED, SPACE, timeout_s=30)).vectors
    backwards = (await model.embed(MIXED[::-1], SPACE, timeout_s=30)).vectors[::-1]
    alone = np.stack([(await model.embed([text], SPACE, timeout_s=30)).vectors[0] for text in MIXED])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    np.testing.assert_allclose(backwards, alone, atol=1e-5)
    vectors.check(together, len(MIXED), 384, unit_norm=True)


async def test_tokens_are_billed_as_the_model_reads_them(model: LocalModel) -> None:
    """Special tokens count, and of a text that is cut what is left of it."""
    assert (await model.embed(["hello world", ""], SPACE, timeout_s=30)).tokens_billed == 4 + 2
    cut = replace(SPACE, truncation="end")
    assert (await model.embed([LONG, "hello"], cut, timeout_s=30)).tokens_billed == 256 + 3


async def test_the_empty_text_has_a_vector(model: LocalModel) -> None:
    """A lone empty text is the empty sequence of the model."""
    vectors.check((await model.embed([""], SPACE, timeout_s=30)).vectors, 1, 384, unit_norm=True)


async def test_a_long_text_is_refused_or_cut_as_the_space_says(model: LocalModel) -> None:
    """Without truncation it is refused; with it the tail does not matter."""
    with pytest.raises(InputRefused, match="256 tokens"):
        await model.embed(["short", LONG], SPACE, timeout_s=30)
    cut = replace(SPACE, truncation="end")
    one, other = (await model.embed([LONG, LONG + "and a tail"], cut, timeout_s=30)).vectors
    np.testing.assert_allclose(one, other, atol=1e-5)


async def test_token_ids_are_refused(model: LocalModel) -> None:
    """Ids of a foreign vocabulary are never read as this model's."""
    with pytest.raises(InputRefused):
        await model.embed(["text", (1, 2)], SPACE, timeout_s=30)


# ── time ────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_call_that_takes_too_long_ends(model: LocalModel) -> None:
    """The attempt's time is kept, and the next call does not wait for the rest of the one before."""
    loop = asyncio.get_running_loop()
    started = loop.time()
    with pytest.raises(CallTimeout):
        await model.embed([LONG] * 500, replace(SPACE, truncation="end"), timeout_s=0.2)
    await model.embed(["next"], SPACE, timeout_s=30)
    assert loop.time() - started < 5  # all of it would take half a minute


async def test_a_cancelled_call_leaves_nothing_behind(model: LocalModel) -> None:
    """Cancelled while it runs or while it waits for its turn, a call frees the worker and leaves no task."""
    space, loop = replace(SPACE, truncation="end"), asyncio.get_running_loop()
    calls = [asyncio.create_task(model.embed([LONG] * 500, space, timeout_s=60)) for _ in range(3)]
    await model_is_busy(model)
    started = loop.time()
    for call in calls:
        call.cancel()
    assert all(isinstance(end, asyncio.CancelledError) for end in await asyncio.gather(*calls, return_exceptions=True))
    await model.embed(["next"], SPACE, timeout_s=30)
    assert loop.time() - started < 5
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def model_is_busy(model: LocalModel) -> None:
    """Returns once the worker has taken the first call."""
    while model._workers._work_queue.qsize() != 2:  # noqa: ASYNC110 (another thread empties it)
        await asyncio.sleep(0)


async def test_the_loop_stays_free_while_the_model_works(model: LocalModel) -> None:
    """While sixty texts are embedded, the loop never stands still for long."""
    loop = asyncio.get_running_loop()
    call = asyncio.create_task(model.embed(MIXED * 6, SPACE, timeout_s=60))
    lags_s, turned = [], loop.time()
    while not call.done():
        await asyncio.sleep(0)
        lags_s.append(loop.time() - turned)
        turned = loop.time()
    assert len(call.result().vectors) == 60
    assert max(lags_s) < 0.25


# ── devices ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("device", list(DEVICES))
async def test_a_named_device_is_used_or_refused(device: str) -> None:
    """Where it is not there, the operator is told what brings it; no other device stands in."""
    if DEVICES[device].provider in onnxruntime.get_available_providers():
        named, known = await vector(FACTS, "some text", device=device), await vector(FACTS, "some text", device="cpu")
        assert named @ known > 0.99
    else:
        with pytest.raises(ConfigurationError) as refused:
            LocalModel(FACTS, device=device)
        assert f'device = "{device}"' in str(refused.value)
        assert DEVICES[device].remedy in str(refused.value)


async def test_auto_takes_the_first_device_that_is_there() -> None:
    """The fastest that can be used gives its bounds; the vectors are those of any other."""
    there = [found for found in DEVICES.values() if found.provider in onnxruntime.get_available_providers()]
    model = LocalModel(FACTS, device="auto")
    assert model.max_items in {found.max_items for found in there}
    await model.aclose()
    assert await vector(FACTS, "some text") @ await vector(FACTS, "some text", device="cpu") > 0.99


@pytest.mark.parametrize("device", list(DEVICES.values()), ids=list(DEVICES))
@given(lengths=st.lists(st.integers(1, 512), max_size=300))
def test_the_network_takes_no_more_at_once_than_its_device(device: Device, lengths: list[int]) -> None:
    """Every text is in one run, and a run of several keeps to the device's texts and, padded, to its tokens."""
    runs = list(_runs(lengths, device))
    assert sorted(place for run in runs for place in run) == list(range(len(lengths)))
    for run in runs:
        assert len(run) <= device.run_items
        assert len(run) == 1 or len(run) * max(lengths[place] for place in run) <= device.run_tokens


@pytest.mark.parametrize(("setting", "calls"), [("device = 'cpu'", 3), ("device = 'cpu'\nmax_batch_items = 40", 1)])
async def test_a_call_carries_what_the_device_likes_or_the_operator_says(
    tmp_path: Path, setting: str, calls: int
) -> None:
    """Forty texts are three calls on a CPU, unless the configuration wants them in one."""
    path = tmp_path / "embedgate.toml"
    path.write_text(
        f"[server]\nlog_file = '{tmp_path}/log'\n[deployments.here]\ndialect = 'local'\n{setting}\n"
        "[models.small]\ndeployments = ['here']\n"
    )
    async with Runtime(load(path, {})) as runtime:
        texts = tuple(f"text {number}" for number in range(40))
        request = EmbeddingRequest(ANONYMOUS, "small", texts, asyncio.get_running_loop().time() + 60)
        assert len((await runtime.gateway.embed(request)).vectors) == 40
        assert runtime.telemetry.registry.get_sample_value("embedgate_batch_items_sum", {"deployment": "here"}) == 40
        left = runtime.telemetry.registry.get_sample_value("embedgate_batch_items_count", {"deployment": "here"})
    assert left == calls


# ── directories ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_directory_is_read_as_sentence_transformers_would(directory: Path) -> None:
    """The original's files make the very facts that are stated for the packaged default."""
    facts = read_model(write(directory, SENTENCE_TRANSFORMERS))
    assert replace(facts, onnx=FACTS.onnx, tokenizer=FACTS.tokenizer) == FACTS
    assert facts.space("m") == FACTS.space("m")


async def test_each_pooling_makes_vectors_of_its_own(directory: Path) -> None:
    """The five poolings give five vectors of one text, and five Spaces."""
    made, spaces = [], set()
    for pooling in ("mean", "cls", "max", "last", "mean_sqrt_len"):
        facts = read_model(directory, pooling)
        made.append(await vector(facts, "a text of some words"))
        spaces.add(facts.space("m").id)
    assert len(spaces) == 5
    for i, one in enumerate(made):
        for other in made[:i]:
            assert not np.allclose(one, other, atol=1e-3)
    mean, root = made[0], made[4]
    np.testing.assert_allclose(root, mean * np.sqrt(7), rtol=1e-4)


@pytest.mark.parametrize(
    ("config", "pooling"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_lasttoken": True}, "last"),
        ({"pooling_mode_max_tokens": True}, "max"),
        ({"pooling_mode_mean_sqrt_len_tokens": True}, "mean_sqrt_len"),
        ({"pooling_mode": "lasttoken", "include_prompt": True}, "last"),
    ],
)
def test_the_poolings_of_sentence_transformers_are_known(directory: Path, config: Files, pooling: str) -> None:
    """Flags and names are understood."""
    assert read_model(write(directory, {"1_Pooling/config.json": config})).pooling == pooling


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"pooling_mode_weightedmean_tokens": True},
        {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True},
        {"pooling_mode": "attention"},
        {"pooling_mode_mean_tokens": True, "include_prompt": False},
    ],
)
def test_a_pooling_that_is_not_known_is_refused_unless_it_is_set(directory: Path, config: Files) -> None:
    """None, another, two at once, or one that leaves the prompt out: the operator must say which."""
    write(directory, {"1_Pooling/config.json": config})
    with pytest.raises(ConfigurationError, match=r"1_Pooling/config\.json .* set pooling to one of mean, cls"):
        read_model(directory)
    assert read_model(directory, "cls").pooling == "cls"


async def test_a_normalize_module_decides_the_length(directory: Path) -> None:
    """Without that module vectors keep the length that they have, and the Space says so."""
    modules = {"modules.json": SENTENCE_TRANSFORMERS["modules.json"][:2]}
    facts = read_model(write(directory, SENTENCE_TRANSFORMERS | modules))
    assert not facts.space("m").normalised
    raw, unit = await vector(facts, "some text"), await vector(FACTS, "some text")
    assert np.linalg.norm(raw) > 1.5
    np.testing.assert_allclose(raw / np.linalg.norm(raw), unit, atol=1e-5)


async def test_prompts_go_in_front_and_change_the_vector(directory: Path) -> None:
    """The model's own prompts are read, and an input of that type is embedded with its prompt in front."""
    prompts = {
        "prompts": {"query": "query: ", "document": "passage: ", "other": "other: "},
        "default_prompt_name": "document",
    }
    facts = read_model(write(directory, SENTENCE_TRANSFORMERS | {"config_sentence_transformers.json": prompts}))
    assert facts.prompts == (("query", "query: "), ("document", "passage: "))
    space = facts.space("m")
    assert space.prompt == "passage: "
    query = await vector(facts, "the text", replace(space, input_type="query", prompt="query: "))
    np.testing.assert_allclose(query, await vector(FACTS, "query: the text"), atol=1e-5)
    assert not np.allclose(query, await vector(facts, "the text"), atol=1e-3)


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({"sentence_bert_config.json": {"max_seq_length": 64}, "tokenizer_config.json": {"model_max_length": 99}}, 64),
        ({"tokenizer_config.json": {"model_max_length": 128}}, 128),
        ({"tokenizer_config.json": {"model_max_length": 10**30}}, 512),
        ({}, 512),
    ],
)
def test_the_limit_is_the_first_that_the_files_name(directory: Path, files: Files, limit: int) -> None:
    """Sentence-Transformers' limit counts before the tokenizer's; none at all is what such models have."""
    assert read_model(write(directory, files), "mean").max_input_tokens == limit


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"modules.json": [{"type": "sentence_transformers.models.Dense", "path": "2_Dense"}]}, "Dense"),
        ({"modules.json": [{"type": "x"}]}, r"modules\.json cannot be read"),
        ({"sentence_bert_config.json": {"max_seq_length": "long"}}, r"sentence_bert_config\.json cannot be read"),
        ({"sentence_bert_config.json": {"do_lower_case": True}}, "lower-cases"),
    ],
)
def test_what_cannot_be_done_right_is_refused(directory: Path, files: Files, words: str) -> None:
    """A step that is not done here, or a file that is not understood, is an error and not another vector."""
    with pytest.raises(ConfigurationError, match=words):
        read_model(write(directory, files), "mean")


def test_a_directory_without_a_model_is_refused(directory: Path) -> None:
    """Both files must be there, and the model must be one."""
    (directory / "tokenizer.json").unlink()
    with pytest.raises(ConfigurationError, match=r"no tokenizer\.json"):
        read_model(directory, "mean")
    (directory / "tokenizer.json").write_text("{}")
    (directory / "model.onnx").unlink()
    (directory / "model.onnx").write_bytes(b"no model")
    with pytest.raises(ConfigurationError, match="not an ONNX model"):
        read_model(directory, "mean")
