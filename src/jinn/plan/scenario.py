"""A scenario: what a TOML file or the command line's options say, checked field by field."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from jinn.plan.chips import ChipTable
from jinn.plan.economics import CostTable, PriceTable, peak_to_mean
from jinn.plan.efficiency import Efficiency
from jinn.plan.tables import (
    ScenarioError,
    choice,
    count,
    flag,
    load,
    numbers,
    quantity,
    read,
    share,
    table,
    tables,
    text,
    texts,
)
from jinn.plan.uncertainty import Range
from jinn.plan.units import CURRENCIES

PRECISIONS = ("bf16", "fp8", "int8", "int4")
KV_DTYPES = ("bf16", "fp8", "int8", "f32")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExchangeTable:
    """[exchange]: what a US dollar costs in other currencies."""

    CNY: float | None = quantity("1", None, positive=True)
    EUR: float | None = quantity("1", None, positive=True)

    def money(self, currency: object) -> dict[str, float]:
        """What one of each known currency is worth in `currency`. Raises ScenarioError."""
        if currency not in CURRENCIES:
            raise ScenarioError(f"currency must be one of {', '.join(CURRENCIES)}, not {currency!r}")
        per_dollar = {"USD": 1.0, "CNY": self.CNY, "EUR": self.EUR}
        own = per_dollar[str(currency)]
        if own is None:
            raise ScenarioError(f"exchange.{currency} is missing: the catalogue's prices are in USD")
        return {name: own / rate for name, rate in per_dollar.items() if rate is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelTable:
    """[model]: a preset's name, or the path of a config.json, a folder or a GGUF file."""

    name: str = text()
    precision: str = choice(PRECISIONS, "bf16")
    kv: str = choice(KV_DTYPES, "bf16")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineTable:
    """[engine]: the software, and how it schedules."""

    name: str = text("vllm")
    pools: str = choice(("shared", "separate", "best"), "best")  # read and generate in the same instances?
    chunk: int = count(8192)  # tokens of prompts in a step
    max_num_seqs: int = count(1024)  # of each rank
    max_chips: int = count(1024)  # of an instance
    drafts: int = count(0, low=0, high=16)
    acceptance: float = share(0.0)

    def __post_init__(self) -> None:
        if self.acceptance > 0 and self.drafts == 0:
            raise ScenarioError("acceptance is given, but drafts is 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementTable:
    """[placement], [prefill_placement]: a split that is not searched for."""

    tp: int = count(1)
    pp: int = count(1)
    dp: int = count(1)
    ep: int = count(1)
    num_seqs: int | None = count(None)  # of each rank


@dataclass(frozen=True, slots=True, kw_only=True)
class TrafficTable:
    """[traffic]: requests a second, users, or tokens a second; and what a request is like."""

    requests: float | None = quantity("requests/s", None, positive=True)
    users: float | None = quantity("users", None, positive=True)
    requests_per_user: float | None = quantity("requests/day", None, positive=True)
    input_rate: float | None = quantity("tokens/s", None, positive=True)
    output_rate: float | None = quantity("tokens/s", None, positive=True)
    input_tokens: float | None = quantity("tokens", None, positive=True)
    output_tokens: float | None = quantity("tokens", None, positive=True)
    cached_share: float = share(0.0)
    cached_rate: float | None = quantity("tokens/s", None)
    variation: float = quantity("1", 0.0, high=20.0)
    peak_to_mean: float | None = quantity("1", None, low=1.0)
    load: tuple[float, ...] | None = numbers("1", None)  # relative, at equal steps through a day

    def __post_init__(self) -> None:
        self._check_rates()
        if self.load and self.peak_to_mean is not None:
            raise ScenarioError("peak_to_mean contradicts load, which says it already")
        if self.load:
            peak_to_mean(self.load)
        if self.cached_share >= 1:
            raise ScenarioError("cached_share must be less than 1: some of a prompt is always new")

    def _check_rates(self) -> None:
        given = [name for name in ("requests", "users", "input_rate") if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise ScenarioError(f"requests, users or input_rate must say how much comes in; there is {found}")
        if self.users is not None and self.requests_per_user is None:
            raise ScenarioError("requests_per_user is missing beside users")
        if self.input_rate is not None and self.output_rate is None:
            raise ScenarioError("output_rate is missing beside input_rate")
        if self.input_rate is None and (self.input_tokens is None or self.output_tokens is None):
            raise ScenarioError("input_tokens and output_tokens of a request are missing")
        if self.cached_rate is not None:
            if self.cached_share:
                raise ScenarioError("cached_rate contradicts cached_share: give one")
            if self.input_rate is None or self.cached_rate >= self.input_rate:
                raise ScenarioError("cached_rate must be less than input_rate")

    @property
    def request_rate(self) -> float | None:
        """Requests per second in the mean; None where only tokens are known."""
        if self.requests is not None:
            return self.requests
        if self.users is not None and self.requests_per_user is not None:
            return self.users * self.requests_per_user / 86400
        return self.input_rate / self.input_tokens if self.input_rate and self.input_tokens else None

    @property
    def rates(self) -> tuple[float, float]:
        """Input and output tokens per second in the mean."""
        if self.input_rate is not None:
            return self.input_rate, self.output_rate or 0.0
        rate = self.request_rate or 0.0
        return rate * (self.input_tokens or 0.0), rate * (self.output_tokens or 0.0)

    @property
    def cached(self) -> float:
        """The share of input tokens that the cache has."""
        if self.cached_rate is not None and self.input_rate:
            return self.cached_rate / self.input_rate
        return self.cached_share

    @property
    def peak(self) -> float:
        return peak_to_mean(self.load) if self.load else self.peak_to_mean or 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetTable:
    """[targets]: what users are promised."""

    first_token: float | None = quantity("s", None, positive=True)
    token: float | None = quantity("s", None, positive=True)
    percentile: float = quantity("1", 0.95, positive=True, high=0.9999)
    load: float = quantity("1", 0.8, positive=True, high=0.99)


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredTable:
    """[measured]: what an instance was seen to do, in place of the speed model."""

    chips: int = count()  # of an instance
    input_rate: float = quantity("tokens/s", positive=True)
    output_rate: float = quantity("tokens/s", positive=True)
    counts_cached: bool = flag(True)  # input_rate has the tokens that the cache had
    source: str = text()


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeScenario:
    """A whole scenario of `jinn plan serve`."""

    name: str = text("serve")
    currency: str = choice(CURRENCIES, "USD")
    exchange: ExchangeTable = table(ExchangeTable, ExchangeTable())
    model: ModelTable | None = table(ModelTable, None)
    chip: tuple[str, ...] = texts()
    chips: tuple[ChipTable, ...] = tables(ChipTable)
    engine: EngineTable = table(EngineTable, EngineTable())
    efficiencies: tuple[Efficiency, ...] = tables(Efficiency)
    traffic: TrafficTable = table(TrafficTable)
    targets: TargetTable = table(TargetTable, TargetTable())
    placement: PlacementTable | None = table(PlacementTable, None)
    prefill_placement: PlacementTable | None = table(PlacementTable, None)
    measured: MeasuredTable | None = table(MeasuredTable, None)
    cost: CostTable = table(CostTable, CostTable())
    prices: PriceTable | None = table(PriceTable, None)
    uncertain: tuple[Range, ...] = tables(Range)

    def __post_init__(self) -> None:
        if (self.model is None) == (self.measured is None):
            raise ScenarioError("model or measured must say what an instance can do, and not both")
        if self.measured is not None and len(self.chip) != 1:
            raise ScenarioError("chip must be the one that measured is of")
        if self.model is not None and self.traffic.input_tokens is None:
            raise ScenarioError("traffic.input_tokens and output_tokens are missing: they decide speed")
        if self.prefill_placement is not None and self.engine.pools == "shared":
            raise ScenarioError("prefill_placement contradicts engine.pools = 'shared'")

    @property
    def dollar(self) -> float:
        """What a US dollar is worth in the scenario's currency."""
        return self.exchange.money(self.currency)["USD"]


Options = Mapping[str, Any]
Scenario = TypeVar("Scenario")


def read_scenario(cls: type[Scenario], path: Path | None, options: Options) -> Scenario:
    """A scenario file with the command line's options laid over it. Raises ScenarioError."""
    values = load(path) if path is not None else {}
    for dotted, value in options.items():
        if value is not None:
            _put(values, dotted, value)
    rates = read(ExchangeTable, values.get("exchange", {}), "exchange")
    return read(cls, values, money=rates.money(values.get("currency", "USD")))


def _put(values: dict[str, Any], dotted: str, value: object) -> None:
    *path, leaf = dotted.split(".")
    for name in path:
        values = values.setdefault(name, {})
        if not isinstance(values, dict):
            raise ScenarioError(f"{name} must be a table")
    values[leaf] = value
