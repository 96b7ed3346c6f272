"""Conversations as the text, and the token ids, that a model was trained on: its chat template, in a sandbox."""

import contextvars
import datetime
import functools
import itertools
import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.utils
import numpy as np
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError, safe_range
from jinja2.visitor import NodeTransformer

from moerec.data.text.tokenizer import TextTokenizer
from moerec.errors import InputError
from moerec.files import read_json, to_plain

MAX_STEPS = 100_000  # rounds of loops and calls of macros in one rendering
MAX_CHARACTERS = 2**24  # that one rendering's expressions may write
_TOKEN_FIELDS = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
_PRIVATE_USE = range(0xE000, 0xF900)  # characters without a meaning


def read_chat_template(folder: Path) -> str | None:
    """A model's chat template: chat_template.jinja, else what tokenizer_config.json says, else None.

    Raises:
      InputError: a file is damaged; the field is neither a text nor a list of named ones with one named default.
    """
    path = Path(folder) / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_bytes().decode()
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: is no UTF-8 text (byte {error.start})") from None
    path = Path(folder) / "tokenizer_config.json"
    template = read_json(path).get("chat_template") if path.exists() else None
    if isinstance(template, list):
        named = {item["name"]: item.get("template") for item in template if isinstance(item, dict) and "name" in item}
        template = named.get("default", template)
    if template is None or isinstance(template, str):
        return template
    raise InputError(f"{path}: chat_template must be a text, or a list of named ones with one named default")


def read_template_tokens(folder: Path) -> dict[str, str]:
    """What templates know besides the messages: `bos_token`, `eos_token` and so on, as tokenizer_config.json has them.

    Raises:
      InputError: the file is damaged; such a field is neither a text nor an object whose `content` is one.
    """
    path = Path(folder) / "tokenizer_config.json"
    config = read_json(path) if path.exists() else {}
    tokens = {}
    for field in _TOKEN_FIELDS:
        value = config.get(field)
        text = value.get("content") if isinstance(value, dict) else value
        if value is not None and not isinstance(text, str):
            raise InputError(f"{path}: {field} must be a text, or an object whose content is one")
        if text is not None:
            tokens[field] = text
    return tokens


def render_chat(
    template: str, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True, **known: Any
) -> str:
    """The text of a conversation, as transformers' `apply_chat_template` renders it.

    Args:
      messages: with `role` and `content`, and what else the template knows of.
      add_generation_prompt: whether the beginning of an answer follows.
      known: what else the template may use: `read_template_tokens`, `tools`, `enable_thinking`; trusted.

    Raises:
      InputError: a message is not of texts, or its role no single word; the template is wrong, refuses the
        conversation, reaches for what a sandbox forbids, or works or writes more than any conversation needs.
    """
    variables = {**to_plain(known), "messages": _check(messages), "add_generation_prompt": add_generation_prompt}
    budget = _budget.set({"steps": MAX_STEPS, "characters": MAX_CHARACTERS})
    try:
        return _compile(template).render(variables)
    except Exception as error:  # a template is a program of others, which may end in any of them
        line = f", line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"chat template{line}: {reason}") from None
    finally:
        _budget.reset(budget)


def encode_chat(
    tokenizer: TextTokenizer,
    template: str,
    messages: Sequence[Mapping[str, str]],
    add_generation_prompt: bool = True,
    trusted_roles: Collection[str] = (),
    **known: Any,
) -> np.ndarray:
    """`[n]` int32 ids of a conversation: the template's control tokens count, those that messages hold are plain text.

    A template may trim, split or test what a message holds, so nothing can stand in for it. Instead a character that
    is nowhere else goes into each control token that a message holds, behind its first character, where no trimming
    is in its way; the rendered text shows then which control tokens are the template's own
    (`TextTokenizer.encode_marked`), and the character is left out. Beginnings and ends of control tokens at the edges
    of a message are marked likewise, so none can be put together from two messages. Where messages hold no such
    thing, the ids are those of `encode_template(render_chat(...))`. A template that looks for a control token in a
    message (`</think>`) does not find it, unless the role is trusted.

    Args:
      trusted_roles: whose messages may hold control tokens: an answer with `<think>` that a model is trained on.

    Raises:
      InputError: as `render_chat`; or half of a surrogate pair is in a message.
    """
    plain = _check(messages)
    used = json.dumps([template, tokenizer.control_tokens, plain, to_plain(known)], ensure_ascii=False)
    marker = next((chr(code) for code in _PRIVATE_USE if chr(code) not in used), None)
    if marker is None:
        raise InputError("messages: hold every character of Unicode's area for private use")
    for message in plain:
        if message["role"] not in trusted_roles:
            texts = {key: text for key, text in message.items() if key != "role"}
            message.update({key: _mark(text, tokenizer.control_tokens, marker) for key, text in texts.items()})
    return tokenizer.encode_marked(render_chat(template, plain, add_generation_prompt, **known), marker)


def _check(messages: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """A copy of the messages as plain dicts. Raises InputError."""
    for index, message in enumerate(messages):
        for key, value in message.items():
            if not isinstance(value, str):
                raise InputError(f"messages[{index}]: {key} must be a text")
        if not re.fullmatch(r"[\w-]+", message.get("role", "")):
            raise InputError(f"messages[{index}]: role must be a word, not {message.get('role')!r}")
    return [dict(message) for message in messages]


def _mark(text: str, tokens: tuple[str, ...], marker: str) -> str:
    """The text with `marker` behind the first character of each of `tokens`, and of parts of them at its edges."""
    found, beginnings, ends = _look_alikes(tokens)
    first, end = len(text) - len(text.lstrip()), len(text.rstrip())
    core = text[first:end]
    starts = {match.start() for match in found.finditer(text)} if tokens else set()
    sizes = range(1, min(len(core), max(map(len, tokens), default=0)) + 1)
    starts |= {end - n for n in sizes if core[-n:] in beginnings}
    if any(core[:n] in ends for n in sizes) or (sizes and any(core in token for token in tokens)):
        starts.add(first)
    places = [0, *(start + 1 for start in sorted(starts)), len(text)]
    return marker.join(text[a:b] for a, b in itertools.pairwise(places))


@functools.lru_cache(maxsize=16)
def _look_alikes(tokens: tuple[str, ...]) -> tuple[re.Pattern[str], frozenset[str], frozenset[str]]:
    """A pattern that is empty where a token begins, so that overlapping ones are found; their beginnings and ends."""
    beginnings = frozenset(token[:n] for token in tokens for n in range(1, len(token)))
    ends = frozenset(token[n:] for token in tokens for n in range(1, len(token)))
    return re.compile(f"(?={'|'.join(map(re.escape, tokens))})"), beginnings, ends


# What the rendering that runs in this thread may still do.
_budget: contextvars.ContextVar[dict[str, int]] = contextvars.ContextVar("budget")


class _Namespace(jinja2.utils.Namespace):
    """A template's namespace, without names such as Python's own: by `__call__` it would pass for a function."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        values = dict(*args[1:], **kwargs)
        jinja2.utils.Namespace.__init__(args[0])
        for name, value in values.items():
            args[0][name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise SecurityError(f"a namespace has no place for {name!r}")
        super().__setitem__(name, value)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` tells transformers which part is the answer; here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012 - as jinja declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox in which chat templates run, with what transformers gives them, and with bounds.

    Each round of a loop and each call of a macro takes a step of the budget, and so does each element of a `range`;
    what is joined or written takes characters. Filters alone (`"x" | center(10**9)`) are as free as in jinja.
    """

    intercepted_binops = frozenset(["+", "*", "**"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[jinja2.ext.loopcontrols, _Generation],
            finalize=self.write,
        )
        self.filters["tojson"] = _to_json
        self.globals.pop("lipsum")
        self.globals.update(
            dict=lambda *args, **kwargs: dict(*args, **kwargs),  # the class itself would let `dict.update` through
            namespace=_Namespace,
            raise_exception=_refuse,
            range=self.range,
            strftime_now=lambda form: datetime.datetime.now().strftime(form),
        )

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _Counted().visit(super()._parse(source, name, filename)).set_environment(self)

    def unsafe_undefined(self, obj: Any, attribute: str) -> jinja2.Undefined:
        raise SecurityError(f"{attribute!r} of a {type(obj).__name__} is not for templates")

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        sizes = [len(value) for value in (left, right) if isinstance(value, (str, list, tuple))]
        numbers = [value for value in (left, right) if isinstance(value, int)]
        if operator == "**" or any(abs(number) >= 2**63 for number in numbers):
            raise SecurityError("powers and numbers beyond 64 bits are not for templates")
        if operator == "*":
            sizes = [size * max(0, number) for size in sizes for number in numbers]
        self.spend("characters", sum(sizes))
        return super().call_binop(context, operator, left, right)

    def spend(self, what: str, amount: int) -> bool:
        """True, so that a condition can hold it. Raises SecurityError where the budget is used up."""
        budget = _budget.get(None)
        if budget is not None:  # there is none where jinja computes constants ahead
            budget[what] -= amount
            if budget[what] < 0:
                raise SecurityError(f"takes more {what} than any conversation needs")
        return True

    def write(self, value: Any) -> Any:
        self.spend("characters", len(value if isinstance(value, str) else str(value)))
        return value

    def join(self, *values: Any) -> str:
        return self.write("".join(map(str, values)))

    def range(self, *args: int) -> range:
        values = safe_range(*args)
        self.spend("steps", len(values))
        return values


class _Counted(NodeTransformer):
    """Puts the budget's steps into the loops and macros of a template, and its characters into `~`."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        if node.test is not None:  # an element that is left out has been looked at
            node.test = nodes.And(_call("spend", "steps", 1), node.test)
        return self.visit_Macro(node)

    def visit_Macro(self, node: nodes.For | nodes.Macro | nodes.CallBlock) -> nodes.Node:
        node.body.insert(0, nodes.ExprStmt(_call("spend", "steps", 1), lineno=node.lineno))
        return self.generic_visit(node)

    visit_CallBlock = visit_Macro

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        call = _call("join")
        call.args = node.nodes
        return call


def _call(name: str, *values: str | int) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(name), [nodes.Const(value) for value in values], [], None, None)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


@functools.lru_cache(maxsize=16)
def _compile(template: str) -> jinja2.Template:
    return _Environment().from_string(template)
