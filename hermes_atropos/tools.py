"""Tools for agents: Python functions and objects, each described by a JSON schema.

    registry = ToolRegistry()

    @registry.register
    def add(a: int, b: int) -> int:
        \"\"\"Add two numbers.\"\"\"
        return a + b

    async with registry.task("sum-1") as task:
        result = await registry.execute(call, task_id=task.task_id)

A tool never raises into the rollout: what goes wrong becomes an answer that the model can read, and is counted.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import itertools
import json
import logging
import re
import tempfile
import time
import typing
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict, TypeVar, Unpack, overload

import docstring_parser
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from pydantic.errors import PydanticUserError
from pydantic.fields import FieldInfo
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import to_json

from hermes_atropos.errors import ConfigurationError, SandboxError, ToolDefinitionError
from hermes_atropos.runtime import run_in_rollout_thread
from hermes_atropos.sandbox import Sandbox
from hermes_atropos.sandbox.wall import WallArguments
from hermes_atropos.toolcalls import ToolCall, error_result, validate
from hermes_atropos.trajectory import ToolResult
from hermes_atropos.values import SURROGATE

__all__ = ["Tool", "ToolRegistry", "ToolResult", "ToolTask"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: What the OpenAI API takes as the name of a function.
NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")

#: A parameter of this name is filled in with the task's id, and the model doesn't see it.
TASK_ID = "task_id"


@dataclass(frozen=True, slots=True)
class Tool:
    """A tool as a registry keeps it.

    Attributes:
        definition: its OpenAI definition.
        run: called with the arguments and the task's id; its answer may be awaitable.
        blocking: whether ``run`` belongs on a thread.
        unchecked: whether ``run`` leaves it to others to check its arguments against the schema.
        parallel: whether it may run beside the other calls of a turn.
        time_limit_s: seconds; None takes the registry's.
    """

    definition: dict[str, Any]
    run: Callable[[dict[str, Any], str | None], Any]
    blocking: bool
    unchecked: bool = False
    parallel: bool = True
    time_limit_s: float | None = None

    @property
    def name(self) -> str:
        return self.definition["function"]["name"]


@dataclass(slots=True)
class ToolTask:
    """One task's use of a registry.

    Attributes:
        task_id: its name.
        sandbox: where its tools act; None for a registry without sandboxes.
    """

    task_id: str
    sandbox: Sandbox | None = None
    _overflow: tempfile.TemporaryDirectory[str] | None = None

    def require_sandbox(self) -> Sandbox:
        """Its sandbox.

        Raises:
            SandboxError: it has none.
        """
        if self.sandbox is None:
            raise SandboxError(f"the task {self.task_id!r} has no sandbox: only Hermes' tools open one (HermesTools)")
        return self.sandbox


class Registration(TypedDict, total=False):
    """What :meth:`ToolRegistry.register` takes beside the tool."""

    name: str | None
    description: str | None
    parallel: bool
    time_limit_s: float | None


class ToolRegistry:
    """Tools by name.

    Args:
        tools: functions or objects to register at once.
        time_limit_s: seconds that a call may take; None sets no limit. A tool's own limit comes first.
        max_result_chars: characters of a result that the model reads; what is longer is cut, and kept in a file.
    """

    def __init__(
        self, tools: Iterable[Any] = (), *, time_limit_s: float | None = None, max_result_chars: int = 100_000
    ) -> None:
        self.time_limit_s = time_limit_s
        self.max_result_chars = max_result_chars
        self._tools: dict[str, Tool] = {}
        self._tasks: dict[str, ToolTask] = {}
        if callable(tools) or not isinstance(tools, Iterable):
            raise ToolDefinitionError(f"{tools!r} is not a list of tools: write [{getattr(tools, '__name__', '…')}]")
        for tool in tools:
            self.register(tool)

    @overload
    def register(self, tool: None = None, **options: Unpack[Registration]) -> Callable[[T], T]: ...

    @overload
    def register(self, tool: T, **options: Unpack[Registration]) -> T: ...

    def register(
        self,
        tool: Any = None,
        *,
        name: str | None = None,
        description: str | None = None,
        parallel: bool = True,
        time_limit_s: float | None = None,
    ) -> Any:
        """Add a tool; also a decorator, with or without arguments.

        Args:
            tool: a function with type hints, asynchronous or not, or an object with ``name``, ``description``,
                ``parameters`` (a JSON schema or a pydantic model) and ``execute(**arguments)``. A function's schema
                comes from its signature, its hints and its docstring (Google's or Sphinx' style). A parameter called
                ``task_id`` gets the task's id and is not shown to the model.
            name, description: instead of the tool's own.
            parallel: False if it changes something that the other calls of a turn may depend on: it then runs alone.
            time_limit_s: seconds that a call may take.

        Returns:
            ``tool`` itself.

        Raises:
            ToolDefinitionError: no name or a taken one, no hints, no schema, or parameters that have no name.
        """
        if tool is None:
            return lambda function: self.register(
                function, name=name, description=description, parallel=parallel, time_limit_s=time_limit_s
            )
        make = _from_object if hasattr(tool, "execute") else _from_function
        made = make(tool, name, description)
        self._add(replace(made, parallel=parallel, time_limit_s=time_limit_s))
        return tool

    def _add(self, tool: Tool) -> None:
        if tool.name in self._tools:
            raise ToolDefinitionError(f"there is a tool {tool.name!r} already: register this one with another name=")
        self._tools[tool.name] = tool

    @property
    def definitions(self) -> list[dict[str, Any]]:
        """The tools as OpenAI ``tools``."""
        return [tool.definition for tool in self._tools.values()]

    def get_prompt_tool_definitions_json(self) -> str:
        """The tools' names, descriptions and schemas as JSON, one a line, for a prompt."""
        return "\n".join(json.dumps(definition, ensure_ascii=False) for definition in self.definitions)

    @property
    def notes(self) -> str:
        """What a system prompt has to say of the tools beside their descriptions; empty by default."""
        return ""

    def __contains__(self, name: object) -> bool:
        return name in self._tools

    def __len__(self) -> int:
        return len(self._tools)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tools)

    @contextlib.asynccontextmanager
    async def task(
        self,
        task_id: str | None = None,
        *,
        workspace: str | Path | None = None,
        copy: bool = False,
        sandbox: str = "folder",
        **wall: Unpack[WallArguments],
    ) -> AsyncIterator[ToolTask]:
        """What one rollout and its verifier need of the tools, for the length of the block.

        Args:
            task_id: a new name by default.
            workspace: the folder in which a sandbox acts, used as it is; None makes a fresh one.
            copy: act in a copy of ``workspace``.
            sandbox, wall: as for ``AtroposAIAgent.task``, where the tools have a sandbox.

        Raises:
            ConfigurationError: a wall is asked for, and the tools are functions of this process.
        """
        task = ToolTask(task_id or f"task-{uuid.uuid4().hex[:12]}")
        if self._tasks.setdefault(task.task_id, task) is not task:
            raise SandboxError(f"a task {task.task_id!r} is open already: wait for its end, or choose another id")
        try:
            await self._open(task, workspace, copy, sandbox, wall)
            yield task
        finally:
            del self._tasks[task.task_id]
            await self._close(task)

    async def _open(
        self, task: ToolTask, workspace: str | Path | None, copy: bool, sandbox: str, wall: WallArguments
    ) -> None:
        """What a kind of registry does for a task before its tools run."""
        if sandbox != "folder" or wall:
            raise ConfigurationError(
                "These tools are functions of this process, which no wall can go around: sandbox='walled' needs tools "
                "with a sandbox, such as HermesTools"
            )

    async def _close(self, task: ToolTask) -> None:
        """What it does after them, whatever happened; also if the opening failed half-way."""
        if task._overflow is not None:
            task._overflow.cleanup()

    async def execute(
        self,
        call: ToolCall,
        *,
        task_id: str | None = None,
        time_limit_s: float | None = None,
        execute_tool: Callable[[ToolCall], Any] | None = None,
    ) -> ToolResult:
        """Run one call. Whatever goes wrong is an unsuccessful result, worded for the model.

        Synchronous tools run on a thread. One that outlasts its time limit is given up: nobody waits for it any more,
        but Python cannot end its thread.

        Args:
            call: its arguments are checked against the tool's schema first, or by the function's own hints.
            task_id: of the open task to which it belongs.
            time_limit_s: seconds, for tools without a limit of their own; None takes the registry's.
            execute_tool: called with the call in place of the tool, asynchronous or not.
        """
        tool = self._tools.get(call.name)
        if tool is None or tool.unchecked or execute_tool is not None:
            [call] = validate([call], self.definitions)
        if tool is None or not call.ok:
            answer = error_result(call, self.definitions)
            return ToolResult(call.name, answer, success=False, error=call.error, call_id=call.id)
        limit = next((s for s in (tool.time_limit_s, time_limit_s, self.time_limit_s) if s is not None), None)
        started = time.perf_counter()
        try:
            async with asyncio.timeout(limit) as timer:
                if execute_tool is None:
                    value = await self._run(tool, call, task_id)
                else:
                    blocking = not inspect.iscoroutinefunction(execute_tool)
                    value = await _called(functools.partial(execute_tool, call), blocking)
            result = self._result(tool.name, value)
        except TimeoutError as error:
            late = f"it took longer than its time limit of {limit:g} seconds" if timer.expired() else str(error)
            result = _failure(tool.name, f"TimeoutError: {late}")
        except ValidationError as error:
            result = _failure(tool.name, f"the arguments do not fit: {_faults(error)}")
        except (Exception, SystemExit) as error:
            logger.warning("the tool %s raised", tool.name, exc_info=True)
            result = _failure(tool.name, f"{type(error).__name__}: {error}")
        result.call_id, result.duration_s = call.id, time.perf_counter() - started
        if len(result.content) > self.max_result_chars:
            await self._cut(result, task_id)
        # The names of files may have some, and no tokenizer takes them.
        result.content = SURROGATE.sub("\ufffd", result.content)
        return result

    async def execute_all(self, calls: Sequence[ToolCall], **options: Any) -> list[ToolResult]:
        """Run the calls of one turn: side by side where their tools allow it, the others alone and in their turn.

        Args:
            calls: in the order in which the model made them.
            options: for ``execute``.

        Returns:
            One result a call, in the order of the calls.
        """
        results: list[ToolResult] = []
        for parallel, group in itertools.groupby(calls, key=self._is_parallel):
            if parallel:
                results += await asyncio.gather(*(self.execute(call, **options) for call in group))
            else:
                results += [await self.execute(call, **options) for call in group]
        return results

    def _is_parallel(self, call: ToolCall) -> bool:
        tool = self._tools.get(call.name)
        return tool is None or tool.parallel

    async def _run(self, tool: Tool, call: ToolCall, task_id: str | None) -> Any:
        return await _called(functools.partial(tool.run, call.arguments, task_id), tool.blocking)

    def _result(self, name: str, value: Any) -> ToolResult:
        if isinstance(value, ToolResult):
            return replace(value, name=name)
        return ToolResult(name, value if isinstance(value, str) else to_json(value, fallback=str).decode())

    async def _cut(self, result: ToolResult, task_id: str | None) -> None:
        """Keep both ends of a long result, and the whole in a file."""
        result.overflow = await self._keep(result, task_id)
        head, tail = self.max_result_chars * 2 // 5, self.max_result_chars * 3 // 5
        left_out = len(result.content) - head - tail
        note = (
            f"\n\n[{left_out:,} of {len(result.content):,} characters are left out here. "
            f"The whole result is in the file {result.overflow}]\n\n"
        )
        result.content = f"{result.content[:head]}{note}{result.content[len(result.content) - tail :]}"

    async def _keep(self, result: ToolResult, task_id: str | None) -> str:
        """Write a result into a file that lives as long as the task, or as the registry where there is none."""
        task = self._tasks.get(task_id or "") or self._tasks.setdefault("", ToolTask(""))
        if task._overflow is None:
            task._overflow = tempfile.TemporaryDirectory(prefix="hermes-atropos-results-")
        path = Path(task._overflow.name, f"{uuid.uuid4().hex[:12]}.txt")
        content = result.content.encode(errors="surrogatepass")
        await run_in_rollout_thread(lambda: path.write_bytes(content))
        return str(path)


async def _called(function: Callable[[], Any], blocking: bool) -> Any:
    """What a function answers, on a thread if it would block the loop, awaited if it can be."""
    value = await run_in_rollout_thread(function, grace=0) if blocking else function()
    return await value if inspect.isawaitable(value) else value


def _failure(name: str, error: str) -> ToolResult:
    return ToolResult(name, json.dumps({"error": error}, ensure_ascii=False), success=False, error=error)


def _faults(error: ValidationError) -> str:
    return "; ".join(f"{'.'.join(map(str, fault['loc'])) or 'arguments'}: {fault['msg']}" for fault in error.errors())


class _WithoutTitles(GenerateJsonSchema):
    """Titles repeat the names of the parameters: tokens that tell a model nothing."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def _schema(model: type[BaseModel]) -> dict[str, Any]:
    schema = model.model_json_schema(schema_generator=_WithoutTitles)
    schema.pop("title", None)
    schema.pop("description", None)
    schema.setdefault("properties", {})
    return schema


def _definition(name: Any, description: Any, parameters: Any) -> dict[str, Any]:
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ToolDefinitionError(f"{name!r} cannot name a tool: give one of 1 to 64 letters, digits, _ and - as name=")
    if not isinstance(parameters, dict) or parameters.get("type") != "object":
        raise ToolDefinitionError(
            f"the tool {name!r} needs parameters: a JSON schema of type object, or a pydantic model"
        )
    description = inspect.cleandoc(description or "")
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def _from_object(tool: Any, name: str | None, description: str | None) -> Tool:
    tool = tool() if isinstance(tool, type) else tool
    parameters = getattr(tool, "parameters", None)
    text = description or getattr(tool, "description", "") or (tool.__doc__ or "").partition("\n\n")[0]
    model = parameters if isinstance(parameters, type) and issubclass(parameters, BaseModel) else None
    schema = parameters if model is None else _schema(model)
    definition = _definition(name or getattr(tool, "name", None), text, schema)
    wants_task = TASK_ID in inspect.signature(tool.execute).parameters

    def run(arguments: dict[str, Any], task_id: str | None) -> Any:
        if model is not None:
            valid = model.model_validate(arguments)
            named = {field.alias or name: getattr(valid, name) for name, field in model.model_fields.items()}
            arguments = named | (valid.model_extra or {})  # as the schema calls them
        return tool.execute(**arguments, **({TASK_ID: task_id} if wants_task else {}))

    return Tool(definition, run, blocking=not inspect.iscoroutinefunction(tool.execute), unchecked=True)


def _from_function(function: Any, name: str | None, description: str | None) -> Tool:
    name = name or getattr(function, "__name__", None)
    if not callable(function):
        raise ToolDefinitionError(f"{function!r} is not a tool: register a function, or an object with execute()")
    summary, of_parameters = _docstring(function)
    parameters = dict(inspect.signature(function).parameters)
    wants_task = parameters.pop(TASK_ID, None) is not None
    try:
        hints = typing.get_type_hints(function, include_extras=True)
    except Exception as error:
        raise ToolDefinitionError(
            f"the type hints of the tool {name!r} cannot be resolved ({error}): define their types in its module"
        ) from error
    fields: dict[str, Any] = {}
    # A model's own attributes (copy, json, schema …) are fine names for parameters, so fields get others.
    names = {f"field_{place}": parameter for place, parameter in enumerate(parameters)}
    for field_name, parameter in zip(names, parameters.values(), strict=True):
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise ToolDefinitionError(
                f"{parameter} of the tool {name!r} cannot be passed by name: give it a name of its own"
            )
        if parameter.name not in hints:
            raise ToolDefinitionError(
                f"the parameter {parameter.name!r} of the tool {name!r} has no type hint, so its schema is unknown: "
                f"write {parameter.name}: str, or whatever it takes"
            )
        known: dict[str, Any] = {"alias": parameter.name}
        if parameter.name in of_parameters:
            known["description"] = of_parameters[parameter.name]
        hint, default = hints[parameter.name], parameter.default
        if isinstance(default, FieldInfo):  # x: int = Field(3, ge=1)
            fields[field_name] = (typing.Annotated[hint, default], Field(**known))
        else:
            fields[field_name] = (hint, Field(... if default is parameter.empty else default, **known))
    try:
        model = create_model(name or "tool", __config__=ConfigDict(extra="forbid"), **fields)
        definition = _definition(name, description or summary, _schema(model))
    except (PydanticUserError, TypeError) as error:
        raise ToolDefinitionError(f"a type of the tool {name!r} has no JSON schema: {error}") from error

    def run(arguments: dict[str, Any], task_id: str | None) -> Any:
        valid = model.model_validate(arguments)
        given = {parameter: getattr(valid, field_name) for field_name, parameter in names.items()}
        return function(**given, **({TASK_ID: task_id} if wants_task else {}))

    return Tool(definition, run, blocking=not inspect.iscoroutinefunction(function))


def _docstring(function: Any) -> tuple[str, dict[str, str]]:
    """A docstring's text before its first section, and what it says of each parameter."""
    found = docstring_parser.parse(inspect.getdoc(function) or "")
    summary = "\n\n".join(filter(None, [found.short_description, found.long_description]))
    return summary, {parameter.arg_name: " ".join((parameter.description or "").split()) for parameter in found.params}
