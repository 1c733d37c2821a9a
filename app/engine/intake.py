"""What a request must be before it may cost anything: a known model, a legal width, texts that fit."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from app import tokens
from app.domain import EmbeddingRequest, Route, Space, Text
from app.errors import InvalidRequest, UnknownModel
from app.ports import TokenCounter, TokenVocabulary

_INLINE_IDS = 20_000
"""Decoding more token ids than this is done in a thread."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A legal request: who serves it, in which Space, and the width to cut to (None: the full one)."""

    request: EmbeddingRequest
    route: Route
    space: Space
    width: int | None


@dataclass(frozen=True, slots=True)
class Sized:
    """A text as it will be sent, with its tokens and bytes."""

    payload: Text
    tokens: int
    size_bytes: int


class Intake:
    """Checks requests against `routes`; `counters` are by model name."""

    def __init__(
        self, routes: Mapping[str, Route], counters: Mapping[str, TokenCounter], vocabulary: TokenVocabulary
    ) -> None:
        self.routes = routes
        self._counters = counters
        self._vocabulary = vocabulary

    def plan(self, request: EmbeddingRequest) -> Plan:
        """Finds who serves `request`. Raises UnknownModel and InvalidRequest."""
        route = self.routes.get(request.model)
        if route is None or not request.tenant.may_use(request.model):
            raise UnknownModel(request.model)
        if request.truncation == "end" and not self._counters[route.model].exact:
            raise InvalidRequest("This model does not support 'truncate'.", param="truncate", code="invalid_value")
        return Plan(request, route, self._space(route, request), self._width(route, request.dimensions))

    def check_total(self, plan: Plan, total_tokens: int, *, at_least: bool = False) -> None:
        """Refuses a request whose texts sum to too many tokens."""
        most = plan.route.max_request_tokens
        if total_tokens > most:
            about = "at least " if at_least else ""
            raise InvalidRequest(
                f"Requested {about}{total_tokens} tokens, max {most} tokens per request",
                code="max_tokens_per_request",
                kind="max_tokens_per_request",
            )

    async def texts(self, plan: Plan) -> Sequence[Text]:
        """The texts as the route takes them: token ids are decoded unless every deployment understands them."""
        texts = plan.request.texts
        if plan.route.takes_token_ids or all(isinstance(text, str) for text in texts):
            return texts
        self.check_total(plan, sum(len(text) for text in texts if not isinstance(text, str)))
        if sum(map(len, texts)) > _INLINE_IDS:
            return await asyncio.to_thread(self._decode, texts)
        return self._decode(texts)

    async def measure(self, plan: Plan, texts: Sequence[Text], known_tokens: int) -> tuple[list[Sized], bool]:
        """Counts `texts`, cuts what may be cut, refuses what is too long; says whether others had a turn meanwhile.

        `known_tokens` are those of the request's other texts, which count towards its total.
        """
        prompt, counter = plan.space.prompt, self._counters[plan.route.model]
        most = plan.space.max_input_tokens
        counts = await tokens.count_many(
            counter, [prompt + text for text in texts if isinstance(text, str)],
            most_each=most, most_total=plan.route.max_request_tokens,
        )  # fmt: skip
        counted = iter(counts.tokens)
        sized = []
        for text in texts:
            payload, count = text, next(counted) if isinstance(text, str) else len(text)
            if count > most and counter.exact:
                payload, count = self._shortened(plan, text, count, at_least=counts.at_least), most
            size_bytes = len(payload.encode()) if isinstance(payload, str) else 8 * len(payload)
            sized.append(Sized(payload, count, size_bytes))
        self.check_total(plan, known_tokens + sum(item.tokens for item in sized), at_least=counts.at_least)
        return sized, counts.took_long

    def _shortened(self, plan: Plan, text: Text, count: int, *, at_least: bool) -> Text:
        """The head of `text` that fits, if the caller wants it cut; else the refusal with both lengths."""
        most = plan.space.max_input_tokens
        if plan.request.truncation == "end":
            if not isinstance(text, str):
                return text[:most]
            prompt = plan.space.prompt
            return self._counters[plan.route.model].cut(prompt + text, most)[len(prompt) :]
        about = "at least " if at_least else ""
        raise InvalidRequest(
            f"This model's maximum context length is {most} tokens, however you requested {about}{count} tokens "
            f"({about}{count} in your prompt; 0 for the completion). Please reduce your prompt; or completion length."
        )

    def _decode(self, texts: Sequence[Text]) -> list[Text]:
        return [text if isinstance(text, str) else self._vocabulary.decode(text) for text in texts]

    def _space(self, route: Route, request: EmbeddingRequest) -> Space:
        space = route.space
        prompt = next((words for kind, words in route.prompts if kind == request.input_type), "")
        if prompt:
            space = replace(space, input_type=request.input_type, prompt=prompt)
        return replace(space, truncation="end") if request.truncation == "end" else space

    def _width(self, route: Route, dimensions: int | None) -> int | None:
        if dimensions is None:
            return None
        if not route.cuts_dimensions:
            raise InvalidRequest("This model does not support specifying dimensions.")
        full = route.space.dimensions
        if 1 <= dimensions <= full:
            return dimensions if dimensions < full else None
        bound, code = (f"less than or equal to {full}", "integer_above_max_value")
        if dimensions < 1:
            bound, code = ("greater than or equal to 1", "integer_below_min_value")
        raise InvalidRequest(
            f"Invalid value for 'dimensions' = {dimensions}. Must be {bound}.", param="dimensions", code=code
        )
