"""`jinn serve`: settings from flags and a TOML file, then the server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer

from jinn.cli.options import (
    DEFAULTS,
    LorasOption,
    ModelArgument,
    ThreadsOption,
    by_name,
    parse_adapters,
    parse_size,
    read_text,
)
from jinn.engine.config import EngineConfig
from jinn.server.config import ServerConfig

_ENGINE_SETTINGS = {field.name for field in fields(EngineConfig)}
_SERVER_SETTINGS = {field.name for field in fields(ServerConfig)}
_LISTS = ("allowed_hosts", "allowed_origins")
_SIZES = ("cache_memory", "tenant_cache_memory", "state_memory", "model_memory")


def _count(name: str, help_text: str) -> Any:
    return typer.Option(metavar="N", help=help_text, show_default=str(DEFAULTS[name]))


def serve(
    context: typer.Context,
    model: ModelArgument = None,
    more_models: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            metavar="NAME=MODEL",
            help="A further model, loaded when it is asked for; repeat it for more.",
            show_default=False,
        ),
    ] = None,
    lora: LorasOption = None,
    host: Annotated[
        str | None, typer.Option(help="Address to listen on.", show_default=DEFAULTS["host"])
    ] = None,
    port: Annotated[int | None, _count("port", "Port to listen on; 0 takes a free one.")] = None,
    threads: ThreadsOption = None,
    max_model_len: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Tokens of prompt and answer together.", show_default="the model's limit"
        ),
    ] = None,
    max_num_seqs: Annotated[
        int | None, _count("max_num_seqs", "Sequences that run at the same time.")
    ] = None,
    max_num_batched_tokens: Annotated[
        int | None, _count("max_num_batched_tokens", "Tokens of one step.")
    ] = None,
    cache_memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Memory for keys and values, such as 2GiB.", show_default="2GiB"),
    ] = None,
    kv_cache_dtype: Annotated[
        str | None, typer.Option(help="bf16, int8 or f32.", show_default=DEFAULTS["kv_cache_dtype"])
    ] = None,
    state_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Part of it for the recurrent states of hybrid models.",
            show_default="half",
        ),
    ] = None,
    speculative: Annotated[
        str | None,
        typer.Option(
            help="Guess several tokens at a time, with the same answers: ngram, draft, mtp or off.",
            show_default=DEFAULTS["speculative"],
        ),
    ] = None,
    num_speculative_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Tokens guessed at a time.", show_default="8 of ngram, 4 of draft, 3 of mtp"
        ),
    ] = None,
    draft_model: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="The smaller model that guesses, for draft.", show_default=False),
    ] = None,
    packed_cache: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Keep packed weights in a file there, so that the next start packs nothing.",
            show_default="none, but experts that do not fit into memory under JINN_HOME",
        ),
    ] = None,
    verify: Annotated[
        bool | None,
        typer.Option("--verify", help="Compare its checksums at the start.", show_default=False),
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(help="The key that clients must send.", show_default="none is needed")
    ] = None,
    api_keys: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Names and their keys, one a line; read again on change.", show_default=False
        ),
    ] = None,
    allowed_hosts: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="A Host to answer to; repeat it for more.",
            show_default="any with keys, else this machine's own names",
        ),
    ] = None,
    allowed_origins: Annotated[
        list[str] | None,
        typer.Option(
            metavar="URL",
            help="Whose web pages may call, such as https://chat.example; repeat it for more.",
            show_default="none",
        ),
    ] = None,
    tls_certificate: Annotated[
        str | None, typer.Option(metavar="FILE", help="Serve https with this chain.", show_default=False)
    ] = None,
    tls_key: Annotated[
        str | None, typer.Option(metavar="FILE", help="The certificate's private key.", show_default=False)
    ] = None,
    unix_socket: Annotated[
        str | None,
        typer.Option(
            metavar="PATH", help="Listen on this socket instead of host and port.", show_default=False
        ),
    ] = None,
    served_model_name: Annotated[
        str | None, typer.Option(help="The model's name in the API.", show_default="the file's")
    ] = None,
    chat_template: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="A Jinja file to use instead of the model's own.", show_default=False
        ),
    ] = None,
    model_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="What the models in memory may take together.", show_default="no limit"
        ),
    ] = None,
    idle_seconds: Annotated[
        float | None,
        typer.Option(
            metavar="S", help="Unload a model of several that was unused so long.", show_default="never"
        ),
    ] = None,
    otlp_traces_endpoint: Annotated[
        str | None,
        typer.Option(
            metavar="URL", help="Send OpenTelemetry traces there; needs jinn[otel].", show_default=False
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="A TOML file of these settings; flags go first.", show_default=False
        ),
    ] = None,
    log_level: Annotated[
        str | None,
        typer.Option(help="debug, info, warning or error.", show_default=DEFAULTS["log_level"]),
    ] = None,
) -> None:
    """Serve a model over the OpenAI API."""
    flags = {
        "model": model,
        "models": more_models,
        "lora": lora,
        "host": host,
        "port": port,
        "threads": threads,
        "max_model_len": max_model_len,
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": max_num_batched_tokens,
        "cache_memory": cache_memory,
        "kv_cache_dtype": kv_cache_dtype,
        "state_memory": state_memory,
        "speculative": speculative,
        "num_speculative_tokens": num_speculative_tokens,
        "draft_model": draft_model,
        "packed_cache": packed_cache,
        "verify": verify,
        "api_key": api_key,
        "api_keys": api_keys,
        "allowed_hosts": allowed_hosts,
        "allowed_origins": allowed_origins,
        "tls_certificate": tls_certificate,
        "tls_key": tls_key,
        "unix_socket": unix_socket,
        "served_model_name": served_model_name,
        "chat_template": chat_template,
        "model_memory": model_memory,
        "idle_seconds": idle_seconds,
        "otlp_traces_endpoint": otlp_traces_endpoint,
        "log_level": log_level,
    }
    settings = read_settings(config) if config else {}
    settings.update({name: value for name, value in flags.items() if value is not None})
    more_models_by_name = parse_models(settings.pop("models", ()))
    server_config, engine_config = make_configs(settings)
    from jinn.engine.client import EngineError
    from jinn.server.serve import serve as serve_until_signalled

    try:
        serve_until_signalled(server_config, engine_config, more_models_by_name, context.obj)
    except EngineError as error:
        raise ValueError(str(error)) from None


def parse_models(models: Sequence[str]) -> dict[str, str]:
    """Paths by name, from `name=model` each. Raises ValueError, WeightsError for a model that is none."""
    from jinn.weights.model_store import resolve_model

    named = by_name(models, "models must be distinct names with models, such as name=model.gguf")
    return {name: str(resolve_model(model)) for name, model in named.items()}


def read_settings(path: Path) -> dict[str, Any]:
    """The settings of a TOML file, under their flags' names. Raises ValueError, also for an unknown one."""
    import tomllib

    try:
        settings = tomllib.loads(read_text(path))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: {error}") from None
    settings = {name.replace("-", "_"): value for name, value in settings.items()}
    known = (_ENGINE_SETTINGS | _SERVER_SETTINGS | {"threads", "models", "lora"}) - {
        "num_threads",
        "lora_adapters",
    }
    for name, value in settings.items():
        if name not in known:
            raise ValueError(f"{path}: unknown setting {name}; known are {', '.join(sorted(known))}")
        if type(value) not in _types(name):
            raise ValueError(f"{path}: {name} must not be of type {type(value).__name__}")
    return settings


def _types(name: str) -> set[type]:
    """What a setting may be in TOML, where nothing stands for None and a size may be a string."""
    if name in ("models", "lora"):
        return {list}
    hints = get_type_hints(EngineConfig) | get_type_hints(ServerConfig)
    hint = hints["num_threads" if name == "threads" else name]
    parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    names = {Literal: str, tuple: list}
    types = {names.get(get_origin(part), part) for part in parts}
    return types | ({int} if float in types else set()) | ({str} if name in _SIZES else set())


def make_configs(settings: dict[str, Any]) -> tuple[ServerConfig, EngineConfig]:
    """Both configs. Raises ValueError naming the setting, WeightsError for the model."""
    from jinn.weights.model_store import resolve_model

    values = dict(settings)
    if "threads" in values:
        values["num_threads"] = values.pop("threads")
    values["lora_adapters"] = parse_adapters(values.pop("lora", ()))
    for name in _SIZES:
        if isinstance(values.get(name), str):
            values[name] = parse_size(values[name])
    for name in _LISTS:
        if name in values:
            values[name] = tuple(map(str, values[name]))
    server = {name: value for name, value in values.items() if name in _SERVER_SETTINGS}
    engine = {name: value for name, value in values.items() if name in _ENGINE_SETTINGS}
    engine["model"] = str(resolve_model(engine.get("model")))
    if "draft_model" in engine:
        engine["draft_model"] = str(resolve_model(engine["draft_model"]))
    return ServerConfig(**server), EngineConfig(**engine)
