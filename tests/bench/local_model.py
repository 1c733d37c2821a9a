"""Measures how much of a bare onnxruntime loop is left of a local model behind the whole engine."""

import asyncio
import random
import statistics
import time
from collections.abc import Sequence

import numpy as np
import onnxruntime

from app.domain import ANONYMOUS, EmbeddingRequest
from app.providers.local import DEVICES, _cores, _runs, default_model
from app.runtime import Runtime
from app.settings import load
from app.tokens import HuggingFaceCounter
from tests.bench.figures import Figure
from tests.bench.processes import RESULTS, apart
from tests.bench.prose import passages

_MODEL = "all-MiniLM-L6-v2"
_ROUNDS, _TEXTS = 3, 128
_CONFIGURATION = """
[server]
log_file = '{log}'
[deployments.local]
dialect = "local"
[models.all-MiniLM-L6-v2]
deployments = ["local"]
"""

Batch = dict[str, "np.ndarray[tuple[int, int], np.dtype[np.int64]]"]


async def measure() -> list[Figure]:
    """Texts per second through the gateway over those of the bare loop, which gets its batches ready-made."""
    rates = await apart(_rates)
    details = {
        "bare_texts_per_s": [round(bare) for bare, _ in rates],
        "embedgate_texts_per_s": [round(ours) for _, ours in rates],
    }
    ratio = statistics.median(ours / bare for bare, ours in rates)
    return [
        Figure("local model: texts/s over a bare onnxruntime loop", ratio, 0.9, "×", at_least=True, details=details)
    ]


def _rates() -> list[tuple[float, float]]:
    return asyncio.run(_measure())


async def _measure() -> list[tuple[float, float]]:
    """Texts per second of the bare loop and of embedgate, per round."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "local.toml"
    path.write_text(_CONFIGURATION.format(log=RESULTS / "local.log"))
    bare, rng, rates = _Bare(), random.Random(7), []
    async with Runtime(load(path, {})) as runtime:
        for label in range(_ROUNDS + 1):
            asked = bare.texts([rng.randint(8, 128) for _ in range(_TEXTS)], label)
            batches = bare.batches(asked)
            started_s = time.perf_counter()
            bare.run(batches)
            between_s = time.perf_counter()
            deadline_s = asyncio.get_running_loop().time() + 600
            await runtime.gateway.embed(EmbeddingRequest(ANONYMOUS, _MODEL, asked, deadline_s))
            ended_s = time.perf_counter()
            rates.append((_TEXTS / (between_s - started_s), _TEXTS / (ended_s - between_s)))
    return rates[1:]  # the first round warms up


class _Bare:
    """The model's file in onnxruntime, with as many threads as embedgate gives it."""

    def __init__(self) -> None:
        facts = default_model()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = _cores()
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = onnxruntime.InferenceSession(str(facts.onnx), options, providers=["CPUExecutionProvider"])
        self._counter = HuggingFaceCounter(facts.tokenizer)
        self._most_tokens = facts.max_input_tokens

    def texts(self, lengths: Sequence[int], label: int) -> tuple[str, ...]:
        """Texts of these lengths in the model's own tokens."""
        return tuple(passages(self._counter, lengths, label))

    def batches(self, texts: Sequence[str]) -> list[Batch]:
        """The runs that embedgate makes of `texts`: sorted within each call."""
        ids = [self._counter.ids(text, self._most_tokens)[0] for text in texts]
        cpu = DEVICES["cpu"]
        calls = (ids[start : start + cpu.max_items] for start in range(0, len(ids), cpu.max_items))
        runs = ([call[place] for place in run] for call in calls for run in _runs(list(map(len, call)), cpu))
        return [self._batch(run) for run in runs]

    def run(self, batches: list[Batch]) -> None:
        """Runs them one after another."""
        for batch in batches:
            self._session.run(None, batch)

    def _batch(self, ids: list[list[int]]) -> Batch:
        shape = len(ids), max(map(len, ids))
        batch: Batch = {name: np.zeros(shape, np.int64) for name in ("input_ids", "attention_mask", "token_type_ids")}
        for row, text in enumerate(ids):
            batch["input_ids"][row, : len(text)] = text
            batch["attention_mask"][row, : len(text)] = 1
        return batch
