"""Where chat templates run: jinja2's sandbox with Hugging Face's settings, narrowed and metered.

A template comes with a model's file, so it is a stranger's code. It may read plain data only, through the
attributes, functions, filters and tests listed here, and it pays for its work (allowance.py): each turn of a
loop and each call of a macro for its whole body, each operation that grows with its operands for their size.
So it ends, at the same place on every machine: within about 0.2 s on a short conversation, within seconds on
the longest.

Not metered: compiling, which MAX_SOURCE_CHARS bounds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from datetime import datetime
from typing import Any

from jinja2 import nodes, pass_context
from jinja2.exceptions import SecurityError, TemplateRuntimeError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import BlockReference, Context, LoopContext, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from jinn.text import allowance
from jinn.text.allowance import Meter
from jinn.text.marks import LIKELY_MARKS

MAX_SOURCE_CHARS = 256 * 1024
_MAX_JSON_INDENT = 16

_Units = Callable[..., int]


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_ATTRIBUTES: tuple[tuple[type, frozenset[str]], ...] = (
    (
        str,
        _names(
            "capitalize casefold count endswith find index isalnum isalpha isascii isdecimal isdigit islower "
            "isnumeric isspace istitle isupper join lower lstrip partition removeprefix removesuffix replace "
            "rfind rindex rpartition rsplit rstrip split splitlines startswith strip swapcase title upper"
        ),
    ),
    (dict, _names("get items keys values")),
    (list, _names("count index")),
    (tuple, _names("count grouper index list")),  # groupby's pairs have names
    (
        LoopContext,
        _names("changed cycle depth depth0 first index index0 last length")
        | _names("nextitem previtem revindex revindex0"),
    ),
)

_FILTERS: dict[str, _Units] = {
    **dict.fromkeys(
        _names("abs count d default first float int items last length"), allowance.constant_units
    ),
    **dict.fromkeys(_names("list map reject rejectattr reverse select selectattr"), allowance.element_units),
    **dict.fromkeys(
        _names("capitalize dictsort e escape groupby lower max min safe sort string title trim truncate")
        | _names("unique upper wordcount"),
        allowance.whole_units,
    ),
    "format": allowance.format_units,
    "indent": allowance.indent_units,
    "join": allowance.join_units,
    "replace": allowance.replace_units,
    "round": allowance.round_units,
}

# Tests that read their operands through; the others look at a type or at a number.
_WHOLE_TESTS = _names("!= < <= == > >= eq equalto ge greaterthan gt in le lessthan lower lt ne upper")

# Filters of the inserted charges: names with a space, which no template can spell.
_CHARGE, _SLICED, _SEARCHED, _WHOLE, _CONCAT = (
    f"jinn {name}" for name in ("charge", "sliced", "searched", "whole", "concat")
)

_ESCAPABLE = re.compile(f"[^\x00-\x7f{LIKELY_MARKS}]")  # marks would be escaped beyond recognition


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment that compiles chat templates. One serves all of them, from any thread."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[loopcontrols, _GenerationTag],
            finalize=_charge_output,
        )
        self.context_class = _MeteredContext
        self.globals = {name: self.globals[name] for name in ("dict", "namespace", "range")}
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        raw_filters = self.filters
        self.filters = {_CHARGE: _charge, _CONCAT: _concat, "tojson": _tojson}
        self.filters[_SLICED] = _charged(allowance.slice_units)
        self.filters[_SEARCHED] = _charged(allowance.search_units)
        self.filters[_WHOLE] = _charged(allowance.whole_units)
        for name, units in _FILTERS.items():
            self._install_filter(name, raw_filters[name], units)
        for name in _WHOLE_TESTS:
            self._install_test(name)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, Namespace):
            return not attr.startswith("_")
        return any(isinstance(obj, kind) and attr in names for kind, names in _ATTRIBUTES)

    def wrap_str_format(self, value: Any) -> None:
        """`str.format` is not among the attributes; templates have `%`."""

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        meter = _meter(context)
        meter.charge(allowance.binop_units(meter, operator, left, right))
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        meter = _meter(__context)
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str | list | dict | tuple):
            args = tuple(meter.realize(arg) for arg in args)
            meter.charge(allowance.method_units(meter, owner, __obj.__name__, args))
        elif isinstance(__obj, LoopContext) or (isinstance(__obj, Macro) and not __obj.catch_varargs):
            meter.charge(1)  # their bodies charge for themselves
        elif __self._is_callable(__obj):
            given = (value for name, value in kwargs.items() if name not in ("_loop_vars", "_block_vars"))
            meter.charge(1 + sum(meter.size(meter.realize(value)) for value in (*args, *given)))
        else:
            raise SecurityError("it calls what is no function of its own")
        return __context.call(__obj, *args, **kwargs)

    def _is_callable(self, obj: Any) -> bool:
        if isinstance(getattr(obj, "__self__", None), LoopContext):
            return True
        known = isinstance(obj, Macro | BlockReference | Undefined)
        return known or any(obj is function for function in self.globals.values())

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        return super()._generate(_ChargeInserter().visit(source), *args, **kwargs)

    def _install_filter(self, name: str, function: Callable[..., Any], units: _Units) -> None:
        raw_name = f"jinn {name}"
        self.filters[raw_name] = function

        @pass_context
        def metered(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
            meter = _meter(context)
            value = meter.realize(value)
            meter.charge(units(meter, value, *args, **kwargs))
            return self.call_filter(raw_name, value, args, kwargs, context)

        self.filters[name] = metered

    def _install_test(self, name: str) -> None:
        raw_name = f"jinn {name}"
        self.tests[raw_name] = self.tests[name]

        @pass_context
        def metered(context: Context, value: Any, *args: Any) -> bool:
            meter = _meter(context)
            meter.charge(allowance.whole_units(meter, value, *args))
            return bool(self.call_test(raw_name, value, args, {}, context))

        self.tests[name] = metered


class _MeteredContext(Context):
    """A rendering's variables, and its meter."""

    def __init__(self, environment: Any, parent: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        super().__init__(environment, parent, *args, **kwargs)
        self.meter = Meter({name: parent[name] for name in parent.keys() - self.globals_keys})

    def derived(self, locals: dict[str, Any] | None = None) -> Context:  # noqa: A002
        context = super().derived(locals)
        if isinstance(context, _MeteredContext):
            context.meter = self.meter
        return context


def _meter(context: Context) -> Meter:
    if not isinstance(context, _MeteredContext):
        raise SecurityError("it runs outside its meter")
    return context.meter


class _GenerationTag(Extension):
    """`{% generation %}` marks what a model is trained on; here its body is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=lineno)


_Body = nodes.For | nodes.Macro | nodes.CallBlock | nodes.Block


class _ChargeInserter(NodeTransformer):
    """Puts into a template's syntax tree the charges that no hook of the environment can make."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802
        charge = _charge_node(node)
        self._charge_body(node)
        if node.test is not None:
            node.test = nodes.And(charge, node.test, lineno=node.lineno)
        return node

    def _charge_body(self, node: _Body) -> nodes.Node:
        charge = nodes.ExprStmt(_charge_node(node), lineno=node.lineno)
        self.generic_visit(node)
        node.body.insert(0, charge)
        return node

    visit_Macro = visit_CallBlock = visit_Block = _charge_body  # noqa: N815

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        if any(operand.op not in ("in", "notin") for operand in node.ops):
            node.expr = _apply(_WHOLE, node.expr)
        for operand in node.ops:
            operand.expr = _apply(_SEARCHED if operand.op in ("in", "notin") else _WHOLE, operand.expr)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            node.node = _apply(_SLICED, node.node)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _apply(_CONCAT, nodes.List(node.nodes, lineno=node.lineno))

    def _charge_whole(self, node: nodes.List | nodes.Tuple | nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        return node if getattr(node, "ctx", "load") != "load" else _apply(_WHOLE, node)

    visit_List = visit_Tuple = visit_Dict = _charge_whole  # noqa: N815


def _apply(filter_name: str, node: nodes.Expr) -> nodes.Expr:
    """`node|filter_name`, or the node itself where there is nothing to charge: a constant."""
    items = node.items if isinstance(node, nodes.List | nodes.Tuple) else [node]
    if filter_name != _CONCAT and all(isinstance(item, nodes.Const) for item in items):
        return node
    return nodes.Filter(
        node, filter_name, [], [], None, None, lineno=node.lineno, environment=node.environment
    )


def _charge_node(body: nodes.Node) -> nodes.Expr:
    """One pass through `body`: its nodes, and the text that it prints."""
    units = sum(1 for _ in body.find_all(nodes.Node))
    units += sum(len(text.data) for text in body.find_all(nodes.TemplateData)) // allowance.CHARS_PER_UNIT
    constant = nodes.Const(units, lineno=body.lineno, environment=body.environment)
    return nodes.Filter(
        constant, _CHARGE, [], [], None, None, lineno=body.lineno, environment=body.environment
    )


@pass_context
def _charge(context: Context, units: int) -> bool:
    _meter(context).charge(units)
    return True


def _charged(units: _Units) -> Callable[..., Any]:
    @pass_context
    def charged(context: Context, value: Any) -> Any:
        meter = _meter(context)
        value = meter.realize(value)
        meter.charge(units(meter, value))
        return value

    return charged


@pass_context
def _concat(context: Context, values: list[Any]) -> str:
    _meter(context).charge(_meter(context).size(values))
    return "".join(map(str, values))


@pass_context
def _charge_output(context: Context, value: Any) -> Any:
    _meter(context).charge(_meter(context).size(value))
    return value


@pass_context
def _tojson(
    context: Context,
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as Hugging Face's templates expect it: no HTML escapes."""
    if indent is not None and not 0 <= indent <= _MAX_JSON_INDENT:
        raise TemplateRuntimeError(f"it indents JSON by more than {_MAX_JSON_INDENT} columns")
    meter = _meter(context)
    width = 1 + (indent or 0) + meter.size(separators)
    meter.charge(meter.size(value) * width)
    text = json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)
    return _ESCAPABLE.sub(lambda match: json.dumps(match[0])[1:-1], text) if ensure_ascii else text


def _raise_exception(message: object) -> None:
    raise TemplateRuntimeError(str(message))


def _strftime_now(format: str) -> str:  # noqa: A002
    return datetime.now().strftime(format)
