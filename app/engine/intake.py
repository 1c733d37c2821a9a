"""What a request must be before it may cost anything: a known model, a legal width, texts that fit."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import msgspec

from app import tokens
from app.domain import EmbeddingRequest, InputType, Route, Space, Text, Truncation
from app.errors import InvalidRequest, UnknownModel
from app.ports import TokenCounter, TokenVocabulary

_BYTES_PER_ID = 8
"""What an id takes in a JSON body."""


class Plan(msgspec.Struct, frozen=True, eq=False):
    """A legal request: who serves it, in which Space, and the width to cut to (None: the Space's own)."""

    request: EmbeddingRequest
    route: Route
    space: Space
    width: int | None

    @property
    def may_degrade(self) -> bool:
        """Whether another model may answer when every deployment is out."""
        return self.request.allow_degraded and bool(self.route.on_outage)


class Sized(msgspec.Struct, frozen=True, eq=False):
    """A text as it will be sent, with its tokens and bytes; or the `windows` that are sent in its place."""

    payload: Text
    tokens: int
    size_bytes: int
    windows: tuple["Sized", ...] = ()


class Intake:
    """Checks requests against `routes`; `counters` are by model name."""

    def __init__(
        self, routes: Mapping[str, Route], counters: Mapping[str, TokenCounter], vocabulary: TokenVocabulary
    ) -> None:
        self.routes = routes
        self._counters = counters
        self._vocabulary = vocabulary
        self._spaces: dict[tuple[str, InputType | None, Truncation | None, int | None], Space] = {}

    def plan(self, request: EmbeddingRequest) -> Plan:
        """Finds who serves `request`. Raises UnknownModel and InvalidRequest."""
        route = self.routes.get(request.model)
        if route is None or not request.tenant.may_use(request.model):
            raise UnknownModel(request.model)
        if request.truncation == "end" and not (self._counters[route.model].exact or route.vendor_cuts):
            raise InvalidRequest("This model does not support 'truncate'.", param="truncate", code="invalid_value")
        if request.truncation == "none" and route.always_cuts:
            text = "This model cuts long inputs: 'truncate' can only be 'end'."
            raise InvalidRequest(text, param="truncate", code="invalid_value")
        width = request.dimensions
        if width is not None:
            _check_size(route, width)
        cut = width if width is not None and route.cuts_dimensions and width < route.space.dimensions else None
        return Plan(request, route, self._space(route, request, None if cut else width), cut)

    def _space(self, route: Route, request: EmbeddingRequest, width: int | None) -> Space:
        """See `space_for`; made once for each of the few ways to ask."""
        way = (route.model, request.input_type, request.truncation, width)
        space = self._spaces.get(way)
        if space is None:
            space = space_for(route, request.input_type, request.truncation)
            self._spaces[way] = space = replace(space, dimensions=width or space.dimensions)
        return space

    def check_total(self, plan: Plan, total_tokens: int) -> None:
        """Refuses a request whose texts sum to too many tokens; an estimate refuses nothing."""
        if total_tokens > plan.route.max_request_tokens and self._counters[plan.route.model].exact:
            raise _too_many(plan.route, total_tokens)

    def texts(self, plan: Plan) -> Sequence[Text]:
        """The texts as the route takes them.

        Token ids are decoded unless every deployment understands them and nothing stands in front of them.
        """
        texts = plan.request.texts
        if isinstance(texts[0], str) or (plan.route.takes_token_ids and not plan.space.prompt):
            return texts  # a request has texts of one kind
        self.check_total(plan, sum(len(text) for text in texts if not isinstance(text, str)))
        return [text if isinstance(text, str) else self._vocabulary.decode(text) for text in texts]

    async def measure(self, plan: Plan, texts: Sequence[Text], known_tokens: int) -> tuple[list[Sized], bool]:
        """Counts `texts`, cuts what may be cut, refuses what is too long; says whether others had a turn meanwhile.

        `known_tokens` are those of the request's other texts, which count towards its total.
        """
        ids = [text for text in texts if not isinstance(text, str)]
        if ids:
            return self._measure_ids(plan, ids, known_tokens), False
        counter, prompt, most = self._counters[plan.route.model], plan.space.prompt, plan.space.max_input_tokens
        said = [prompt + text for text in texts if isinstance(text, str)]
        took_long = sum(map(len, said)) > tokens.INLINE_CHARS
        if plan.space.truncation == "end" and counter.exact:
            said = await tokens.cut_many(counter, said, most)
        most_total = plan.route.max_request_tokens - known_tokens
        longest = most_total if plan.space.truncation == "mean" else most
        counts = await tokens.count_many(counter, said, most_each=longest, most_total=most_total)
        if isinstance(counts, tokens.TooManyTokens):
            if counts.position is not None:
                raise _too_long(most, str(counts))
            raise _too_many(plan.route, counts.tokens + known_tokens, exact=counts.exact)
        sized = [
            Sized(text[len(prompt) :], count, len(text.encode())) for text, count in zip(said, counts, strict=True)
        ]
        if plan.space.truncation == "mean":
            sized = [await self._windowed(plan, each) if each.tokens > most else each for each in sized]
        return sized, took_long

    async def _windowed(self, plan: Plan, long: Sized) -> Sized:
        """A text that is too long, as overlapping windows that are not."""
        counter, prompt, most = self._counters[plan.route.model], plan.space.prompt, plan.space.max_input_tokens
        most -= counter.count(prompt) if prompt else 0
        [pieces] = await tokens.windows_many(counter, [str(long.payload)], most, plan.route.overlap_tokens)
        said, whole = [prompt + piece for piece in pieces], long.tokens
        counts = await tokens.count_many(counter, said, most_each=whole, most_total=whole * len(said))
        if isinstance(counts, tokens.TooManyTokens):
            raise _too_long(most, str(counts))
        windows = tuple(Sized(p, count, len(p.encode())) for p, count in zip(pieces, counts, strict=True))
        return msgspec.structs.replace(long, tokens=sum(each.tokens for each in windows), windows=windows)

    def _measure_ids(self, plan: Plan, texts: Sequence[tuple[int, ...]], known_tokens: int) -> list[Sized]:
        most = plan.space.max_input_tokens
        if plan.space.truncation == "end":
            texts = [ids[:most] for ids in texts]
        mean = plan.space.truncation == "mean"
        if (longest := max(map(len, texts))) > most and not mean:
            raise _too_long(most, str(longest))
        self.check_total(plan, known_tokens + sum(map(len, texts)))
        step = most - plan.route.overlap_tokens
        return [
            _sized(ids, [ids[at : at + most] for at in range(0, len(ids) - plan.route.overlap_tokens, step)])
            if len(ids) > most
            else _sized(ids)
            for ids in texts
        ]


def _check_size(route: Route, dimensions: int) -> None:
    """Raises InvalidRequest for a width that nobody makes."""
    full, sizes = route.space.dimensions, route.sizes
    if not route.cuts_dimensions and not sizes:
        raise InvalidRequest("This model does not support specifying dimensions.")
    if dimensions == full or (dimensions in sizes if sizes else 1 <= dimensions <= full):
        return
    least, most = (min(sizes), max(full, *sizes)) if sizes else (1, full)
    bound, code = f"less than or equal to {most}", "integer_above_max_value"
    if dimensions < least:
        bound, code = f"greater than or equal to {least}", "integer_below_min_value"
    elif dimensions <= most:
        bound, code = f"one of {', '.join(map(str, sorted({*sizes, full})))}", "invalid_value"
    message = f"Invalid value for 'dimensions' = {dimensions}. Must be {bound}."
    raise InvalidRequest(message, param="dimensions", code=code)


def space_for(route: Route, input_type: InputType | None = None, truncation: Truncation | None = None) -> Space:
    """Where the vectors of a request lie that asks this of the route; None: it does not say."""
    space, kind, way = route.space, input_type or route.default_input_type, truncation or route.long_input
    for told_apart, prompt in route.prompts:
        if told_apart == kind:
            space = replace(space, input_type=kind, prompt=prompt)
    return space if way == "none" else replace(space, truncation=way)


def _sized(ids: tuple[int, ...], windows: Sequence[tuple[int, ...]] = ()) -> Sized:
    parts = tuple(map(_sized, windows))
    return Sized(ids, sum(part.tokens for part in parts) or len(ids), _BYTES_PER_ID * len(ids), parts)


def _too_many(route: Route, number: int, *, exact: bool = True) -> InvalidRequest:
    said, code = f"{'' if exact else 'at least '}{number}", "max_tokens_per_request"
    message = f"Requested {said} tokens, max {route.max_request_tokens} tokens per request"
    return InvalidRequest(message, code=code, kind=code)


def _too_long(most: int, number: str) -> InvalidRequest:
    """The older of OpenAI's two wordings: clients parse it (`bad-inputs.md` E20)."""
    return InvalidRequest(
        f"This model's maximum context length is {most} tokens, however you requested {number} tokens "
        f"({number} in your prompt; 0 for the completion). Please reduce your prompt; or completion length."
    )
