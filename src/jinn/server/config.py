"""The server's settings, each declared once."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, field
from typing import Literal, get_args

from jinn.logs import LogLevel

ToolFormatName = Literal["auto", "none", "hermes", "qwen_xml", "deepseek_v3", "deepseek_v31"]
ReasoningField = Literal["reasoning_content", "reasoning", "both"]


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """What an operator may choose. Raises ValueError naming the field.

    An address that others can reach needs a key. `served_model_name=None` takes the model's file name.
    `allowed_hosts=()` allows any Host where there are keys, and else only this machine's own names.
    """

    host: str = "127.0.0.1"
    port: int = 8000  # 0: any free one
    api_key: str | None = field(default=None, repr=False)
    served_model_name: str | None = None
    chat_template: str | None = None  # a path
    log_level: LogLevel = "info"
    tolerate_unknown_fields: bool = False  # name them in `x-jinn-ignored` instead of refusing them
    drain_seconds: float = 30.0  # that running requests get after SIGTERM
    api_keys: str | None = None  # a path; see `jinn.server.keys`
    allowed_hosts: tuple[str, ...] = ()  # values of Host, without the port; `*` is any
    allowed_origins: tuple[str, ...] = ()  # of web pages that may call, such as https://chat.example
    public_metrics: bool = False  # /metrics needs no key
    tls_certificate: str | None = None  # a path
    tls_key: str | None = None  # a path
    unix_socket: str | None = None  # a path to listen on instead of host and port
    model_memory: int | None = None  # bytes that the models in memory may take together
    idle_seconds: float | None = None  # after which an unused model of several is unloaded
    max_queue: int = 1024  # requests beyond those that run; more get 429
    tool_format: ToolFormatName = "auto"  # how the model writes calls; auto: as its chat template shows
    otlp_traces_endpoint: str | None = None  # a URL that takes traces; needs the extra `otel`
    reasoning_field: ReasoningField = "reasoning_content"  # that holds thoughts in answers

    def __post_init__(self) -> None:
        if not isinstance(self.port, int) or not 0 <= self.port <= 65535:
            raise ValueError(f"port must be between 0 and 65535, not {self.port}")
        if self.api_key is not None and (
            not self.api_key or self.api_key.strip() != self.api_key or not self.api_key.isascii()
        ):
            raise ValueError("api_key must be ASCII, not empty, and must not begin or end with a space")
        if self.served_model_name is not None and not 1 <= len(self.served_model_name) <= 256:
            raise ValueError("served_model_name must have 1 to 256 characters")
        _check_choice("log_level", self.log_level, get_args(LogLevel))
        _check_choice("tool_format", self.tool_format, get_args(ToolFormatName))
        _check_choice("reasoning_field", self.reasoning_field, get_args(ReasoningField))
        if not 0 <= self.drain_seconds <= 86_400:
            raise ValueError(f"drain_seconds must be between 0 and 86400, not {self.drain_seconds}")
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key must be given together")
        if self.idle_seconds is not None and not 0 < self.idle_seconds <= 10**9:
            raise ValueError(f"idle_seconds must be between 0 and 1000000000, not {self.idle_seconds}")
        if self.model_memory is not None and self.model_memory < 1:
            raise ValueError(f"model_memory must be at least 1, not {self.model_memory}")
        if not 0 <= self.max_queue <= 1_000_000:
            raise ValueError(f"max_queue must be between 0 and 1000000, not {self.max_queue}")
        endpoint = self.otlp_traces_endpoint
        if endpoint is not None and not re.fullmatch(r"https?://[^/\s]+(/\S*)?", endpoint):
            raise ValueError(
                f"otlp_traces_endpoint must be like http://127.0.0.1:4318/v1/traces, not {endpoint}"
            )
        for origin in self.allowed_origins:
            if origin != "*" and not re.fullmatch(r"https?://[^/\s]+", origin):
                raise ValueError(f"allowed_origins must be like https://chat.example, not {origin}")
        if not self.has_keys and self.unix_socket is None and not is_loopback(self.host):
            raise ValueError(f"host {self.host} can be reached by others, so api_key or api_keys must be set")

    @property
    def has_keys(self) -> bool:
        return self.api_key is not None or self.api_keys is not None

    @property
    def reasoning_fields(self) -> tuple[str, ...]:
        """The names under which answers hold thoughts."""
        return (
            ("reasoning_content", "reasoning") if self.reasoning_field == "both" else (self.reasoning_field,)
        )

    @property
    def hosts(self) -> frozenset[str]:
        """The values of Host that are answered, in lower case; `*` is any."""
        if self.allowed_hosts:
            return frozenset(host.lower() for host in self.allowed_hosts)
        return frozenset({"*"} if self.has_keys else {"localhost", "127.0.0.1", "[::1]", self.host.lower()})


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value}")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`; a name other than localhost is not trusted to be."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
