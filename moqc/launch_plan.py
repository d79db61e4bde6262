"""From a scheduled module to the launches of one of its functions: what replaces TVM's virtual machine.

TVM plans the memory of intermediate tensors; here its plan is read off, and every call of a PrimFunc becomes
the launches of its kernels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import tvm
from tvm import IRModule, relax, tirx
from tvm.ir import GenericConst

from moqc.device_code import PREAMBLES, TYPES, DeviceCode, compile_function, expression, substitute
from moqc.errors import InternalError, TargetError
from moqc.ir.annotations import CACHE
from moqc.ir.sites import bindings, input_count, weight_names
from moqc.launches import Buffer, Kernel, Launch, Launches, Output, Program, Tensor, evaluate
from moqc.schedules.portable.lower import WORDS
from moqc.targets import Target

_ALIASES = ("relax.memory.alloc_tensor", "relax.memory.view", "relax.reshape")
_IGNORED = ("relax.memory.kill_storage", "relax.memory.kill_tensor")


def plan_launches(mod: IRModule, target: Target) -> Launches:
    """Generate the kernels of main and list its launches.

    `mod` went through legalize and schedule. Parameters of main beyond the inputs and before the caches are
    weights. Raises TargetError where a buffer is larger than a device of `target` can bind.
    """
    planner = Planner(mod, target)
    cache = CACHE.get(mod)
    main = planner.program("main", 0 if cache is None else len(cache["tensors"]))
    return Launches(
        language=target.tvm["kind"],
        types=TYPES[target.tvm["kind"]],
        preamble=PREAMBLES[target.tvm["kind"]],
        kernels=planner.kernels,
        main=main,
    )


class Planner:
    """Plans functions of one module; `kernels` are those that the programs so far launch."""

    def __init__(self, mod: IRModule, target: Target) -> None:
        self.kernels: dict[str, Kernel] = {}
        self._limit: int | None = target.largest_binding
        self._name = target.name
        self._machine = tvm.target.Target(target.tvm)
        self._functions: dict[str, DeviceCode] = {}
        with self._machine:
            self._mod = tvm.transform.Sequential(memory_passes())(mod)
        self.names = weight_names(self._mod)

    def program(self, name: str, caches: int) -> Program:
        """The launches of function `name`, whose last `caches` parameters are caches."""
        function = self._mod[name]
        bounds = (function.attrs or {}).get("tir_var_upper_bound", {})
        variables = {str(key): int(bound) for key, bound in bounds.items()}
        reader = _Reader(self, variables)
        inputs = input_count(function) if name == "main" else len(function.params)
        for number, parameter in enumerate(function.params):
            reader.parameter(parameter, number, inputs, len(function.params) - caches)
        for variable, value in bindings(function):
            reader.read(variable, value)
        outputs = reader.outputs(function.body.body)
        program = Program(
            variables=variables,
            buffers=tuple(reader.buffers),
            launches=tuple(reader.launches),
            outputs=tuple(outputs),
        )
        self._check(program)
        return program

    def code(self, name: str) -> DeviceCode:
        """The kernels of a PrimFunc."""
        if name not in self._functions:
            self._functions[name] = compile_function(name, self._mod[name], self._machine)
            self.kernels |= self._functions[name].kernels
        return self._functions[name]

    def _check(self, program: Program) -> None:
        for buffer in program.buffers:
            if self._limit is not None and buffer.bytes > self._limit:
                what = buffer.weights[0].name if buffer.weights else f"a buffer of {buffer.role}"
                raise TargetError(
                    f"{what}: {buffer.bytes:,} bytes in one buffer, {self._name} binds at most "
                    f"{self._limit:,}; use fewer bits, a shorter --context or a smaller --max-batch"
                )


def memory_passes() -> list[tvm.transform.Pass]:
    """From scheduled kernels to calls of them, with the memory of intermediate tensors planned."""
    return [
        relax.transform.RewriteDataflowReshape(),
        relax.transform.ToNonDataflow(),
        relax.transform.RemovePurityChecking(),
        relax.transform.CallTIRRewrite(),
        relax.transform.StaticPlanBlockMemory(),
    ]


@dataclass
class _Reader:
    """Walks over a function's bindings; every variable is a buffer, a tuple of variables, or nothing."""

    planner: Planner
    variables: dict[str, int]
    buffers: list[Buffer] = field(default_factory=list)
    launches: list[Launch] = field(default_factory=list)
    _places: dict[int, Any] = field(default_factory=dict)
    _known: dict[Any, int] = field(default_factory=dict)

    def parameter(self, parameter: relax.Var, number: int, inputs: int, caches: int) -> None:
        """Declare parameter `number`: the first `inputs` are inputs, those from `caches` on are caches."""
        if inputs <= number < caches:
            # A weight: a buffer once it is known what is read with it.
            self._places[hash(parameter)] = parameter
            return
        cache = number >= caches
        buffer = Buffer(
            bytes=self._bytes(parameter.ty),
            role="cache" if cache else "input",
            number=number - caches if cache else number,
            dtype=str(parameter.ty.dtype),
            shape=tuple(expression(extent) for extent in parameter.ty.shape),
        )
        self._places[hash(parameter)] = self._add(buffer)

    def read(self, variable: relax.Var, value: relax.Expr) -> None:
        """Follow one binding."""
        name = str(value.op.name) if isinstance(value, relax.Call) and isinstance(value.op, tvm.ir.Op) else ""
        if isinstance(value, (relax.Var, GenericConst)):
            self._places[hash(variable)] = self._places.get(hash(value), value)
        elif isinstance(value, relax.Tuple):
            self._places[hash(variable)] = [self._places.get(hash(item), item) for item in value.fields]
        elif isinstance(value, relax.TupleGetItem):
            self._places[hash(variable)] = self._places[hash(value.tuple_value)][int(value.index)]
        elif name in ("relax.memory.alloc_storage", "relax.builtin.alloc_tensor"):
            self._places[hash(variable)] = self._allocate(name, value, variable)
        elif name in _ALIASES:
            self._places[hash(variable)] = self._places[hash(value.args[0])]
        elif name in _IGNORED:
            return
        elif isinstance(value, relax.Call) and isinstance(value.op, tvm.ir.GlobalVar):
            self._call(str(value.op.name_hint), list(value.args))
        elif isinstance(value, relax.Call) and isinstance(value.op, relax.ExternFunc):
            self._extern(variable, value)
        else:
            raise InternalError(f"no launch does {value}")

    def outputs(self, result: relax.Expr) -> list[Output]:
        """The results, from what the function returns."""
        place = self._places[hash(result)]
        items = place if isinstance(place, list) else [place]
        types = list(result.ty.fields) if isinstance(place, list) else [result.ty]
        return [
            Output(buffer=item, shape=tuple(expression(extent) for extent in ty.shape))
            for item, ty in zip(items, types, strict=True)
        ]

    def _extern(self, variable: relax.Var, value: relax.Call) -> None:
        name = str(value.op.global_symbol)
        if name == WORDS:
            self._places[hash(variable)] = self._weights(value.args)
        elif name == "vm.builtin.reshape":
            self._places[hash(variable)] = self._places[hash(value.args[0])]
        else:
            raise TargetError(f"the model calls {name}, which {self.planner._name} has no kernel for")

    def _allocate(self, name: str, value: relax.Call, variable: relax.Var) -> int:
        if name == "relax.builtin.alloc_tensor":  # not planned: it leaves the function
            return self._add(Buffer(bytes=self._bytes(variable.ty), role="output"))
        size = evaluate(expression(value.args[0].values[0]), self.variables)
        return self._add(Buffer(bytes=max(4, -(-size // 4) * 4), role="scratch"))

    def _add(self, buffer: Buffer) -> int:
        self.buffers.append(buffer)
        return len(self.buffers) - 1

    def _bytes(self, ty: relax.TensorType) -> int:
        """Bytes of a tensor at the upper bounds."""
        elements = prod(evaluate(expression(extent), self.variables) for extent in ty.shape)
        return max(4, -(-elements * np.dtype(str(ty.dtype)).itemsize // 4) * 4)

    def _weights(self, parameters: Sequence[relax.Var]) -> int:
        """The buffer of these parameters; one that was asked for before is used again."""
        key = tuple(self.planner.names[parameter] for parameter in parameters)
        if key not in self._known:
            tensors = [
                Tensor(
                    name=name,
                    dtype=str(parameter.ty.dtype),
                    shape=tuple(int(extent) for extent in parameter.ty.shape),
                )
                for name, parameter in zip(key, parameters, strict=True)
            ]
            size = sum(self._bytes(parameter.ty) for parameter in parameters)
            self._known[key] = self._add(Buffer(bytes=size, role="weights", weights=tuple(tensors)))
        return self._known[key]

    def _constant(self, constant: GenericConst) -> int:
        data = np.ascontiguousarray(constant.value.numpy())
        key = (str(data.dtype), data.tobytes())
        if key not in self._known:
            content = data.tobytes() + b"\0" * (-data.nbytes % 4)
            self._known[key] = self._add(Buffer(bytes=len(content), role="constant", constant=content.hex()))
        return self._known[key]

    def _argument(self, argument: relax.Expr) -> Any:
        """The buffer of an argument, or its value if it is an integer."""
        if isinstance(argument, GenericConst):
            return self._constant(argument)
        place = self._places.get(hash(argument), argument)
        if isinstance(place, GenericConst):
            return self._constant(place)
        if isinstance(place, relax.Var) and isinstance(place.ty, relax.TensorType):
            return self._weights([place])
        return place

    def _call(self, name: str, arguments: list[relax.Expr]) -> None:
        code = self.planner.code(name)
        bound = self._bind(code, arguments)
        places = [self._argument(argument) for argument in arguments]
        for launch in code.launches:
            buffers = tuple(places[number] for number in launch.buffers)
            self.launches.append(
                Launch(
                    kernel=launch.kernel,
                    buffers=buffers,
                    scalars=tuple(substitute(value, bound) for value in launch.scalars),
                    grid=tuple(substitute(value, bound) for value in launch.grid),
                    when=substitute(launch.when, bound),
                )
            )

    def _bind(self, code: DeviceCode, arguments: Sequence[relax.Expr]) -> Mapping[str, Any]:
        """What the variables of a PrimFunc's shapes and scalars are in a call."""
        bound: dict[str, Any] = {}
        for parameter, argument in zip(code.parameters, arguments, strict=True):
            if not isinstance(argument.ty, relax.TensorType):
                bound[str(parameter.name)] = expression(getattr(argument, "value", argument))
                continue
            for extent, actual in zip(parameter.shape, argument.ty.shape, strict=True):
                if isinstance(extent, tirx.Var):
                    bound.setdefault(str(extent.name), expression(actual))
        return bound
