"""Hides how settings become what is served: models' files are read, each name gets its Route and its counter."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import assert_never

from app.domain import Deployment, Route, Space
from app.errors import ConfigurationError
from app.ports import TokenCounter
from app.providers.local import LocalModelFacts, default_model, read_model
from app.settings import LocalDeployment, ModelFacts, RemoteDeployment, Settings
from app.tokens import Cl100k, Estimate, HuggingFaceCounter


@dataclass(frozen=True, slots=True)
class Served:
    """One model name with all that serves it."""

    route: Route
    counter: TokenCounter


class Menu:
    """Everything that `settings` serve, by model name. Reads files, so it is made in a thread; ConfigurationError."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.vocabulary = Cl100k()
        self.local: dict[str, LocalModelFacts] = {}
        self._read_models()
        self.vocabulary.load()
        self.models: Mapping[str, Served] = {name: self._served(name) for name in settings.models}

    def _read_models(self) -> None:
        """Opens the files of every local deployment: their facts make its Space."""
        for name, settings in self.settings.deployments.items():
            if isinstance(settings, LocalDeployment):
                path = settings.path
                self.local[name] = (
                    read_model(Path(path).expanduser(), settings.pooling or None) if path else default_model()
                )

    def _served(self, name: str) -> Served:
        """The Route and the token counter of the model `name`."""
        model, facts = self.settings.models[name], self.settings.facts(name)
        deployments = tuple(self._deployment(each, facts.unit_norm) for each in model.deployments)
        local = self.local.get(model.deployments[0])
        if local is not None:
            self._check_local(name, [self.local[each] for each in model.deployments])
            space, prompts = local.space(name), local.prompts
        else:
            space, prompts = _remote_space(name, facts), facts.prompts
        remote = [each for each in map(self.settings.deployments.get, model.deployments) if each is not None]
        route = Route(
            name, space, deployments,
            cuts_dimensions=facts.cuts_dimensions, sizes=facts.sizes, prompts=prompts,
            default_input_type=facts.default_input_type, long_input=model.truncation,
            overlap_tokens=model.overlap_tokens, spread=model.order == "spread", spill_s=model.spill_s,
            vendor_cuts=all(isinstance(each, RemoteDeployment) and each.wire.cuts for each in remote),
            always_cuts=not facts.counts_exactly
            and any(isinstance(each, RemoteDeployment) and each.wire.cuts_silently for each in remote),
            on_outage=model.on_outage, created=facts.created, owned_by=facts.owned_by,
        )  # fmt: skip
        return Served(route, HuggingFaceCounter(local.tokenizer) if local else self._counter(facts.tokenizer))

    def _counter(self, tokenizer: str | None) -> TokenCounter:
        """Who counts for a model whose tokenizer is the vocabulary of callers, an estimate, or a file."""
        match tokenizer:
            case "cl100k_base":
                return self.vocabulary
            case None | "estimate":
                return Estimate()
            case path:
                return HuggingFaceCounter(Path(path).expanduser())

    def _check_local(self, name: str, models: list[LocalModelFacts]) -> None:
        """What only the models' files can tell to be wrong."""
        if len({model.space(name) for model in models}) > 1:
            raise ConfigurationError(f"models.{name}.deployments: these directories hold different models")
        settings, most = self.settings.models[name], models[0].max_input_tokens
        if settings.truncation == "mean" and 2 * settings.overlap_tokens >= most:
            raise ConfigurationError(f"models.{name}.overlap_tokens: must be less than half of the {most} that fit")

    def _deployment(self, name: str, unit_norm: bool) -> Deployment:
        settings = self.settings.deployments[name]
        deployment = Deployment(
            name,
            settings.model,
            limits=settings.limits(),
            attempts=settings.retry(),
            breaker=self.settings.breaker(name),
            timeout_s=settings.timeout_s,
            price=settings.price,
        )
        match settings:
            case RemoteDeployment():
                return replace(deployment, unit_norm=unit_norm, takes_token_ids=settings.understands_token_ids)
            case LocalDeployment():
                return replace(deployment, unit_norm=self.local[name].normalised)
            case _:
                assert_never(settings)


def _remote_space(name: str, facts: ModelFacts) -> Space:
    """Where the vectors of a model that is called over the network may be compared."""
    if facts.dimensions is None:
        raise ConfigurationError(f"models.{name}.dimensions: say how wide its vectors are")
    return Space(
        facts.upstream,
        facts.dimensions,
        normalised=facts.unit_norm,
        max_input_tokens=facts.max_input_tokens or 8192,
    )
