"""The optimizer that holds exact weights: state, masters, the applied-step count; adamw.py and sgd.py add the rule.

`step()` is for plain loops (torch's schedulers and GradScaler work); `apply()` is what a training step calls: unscaling and clipping
are one factor inside the update, and whether it happens at all is a 0-d bool on the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from fewbits.choice import Choice
from fewbits.errors import FewbitsError
from fewbits.numerics.update import wide_dtype
from fewbits.optim import engine, master, moments

Scalar = float | Tensor


class Optimizer(torch.optim.Optimizer):
    """Base of AdamW, Adam and SGD. Not for use by itself.

    State per parameter, made at the first update with a gradient: the moments (`moment_names`; fp32, fp64 for fp64), `master` (see
    master.py) and `since`, the count of applied steps before its birth. All of it is shaped, placed and sharded like the parameter
    (`since`: 0-d int64).
    """

    _step_supports_amp_scaling = True  # torch's GradScaler then hands over grad_scale and found_inf instead of waiting for the device
    moment_names: ClassVar[tuple[str, ...]] = ()
    rule: ClassVar[engine.Rule]

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        master: str = "auto",
        moments: str = "fp32",
        compile: bool | str = "auto",
    ) -> None:
        _check_kinds(master, moments)
        self.master = master
        self.moments = moments
        self.compile = compile
        params = list(params) if not isinstance(params, Tensor) else [params]
        if not params:
            raise FewbitsError("the optimizer got no parameters; pass model.parameters() or model.named_parameters().")
        super().__init__(params, defaults)
        device = self.param_groups[0]["params"][0].device
        self.execution: Choice = engine.choose_execution(compile, device)
        self.applied_steps: Tensor = torch.zeros((), dtype=torch.int64, device=device)
        self._one: Tensor = torch.ones((), device=device)
        self._constants: dict[float, Tensor] = {}

    # What a rule defines

    def check_group(self, group: dict[str, Any]) -> None:
        """Raises FewbitsError for options that do not fit."""

    def group_moments(self, group: dict[str, Any]) -> tuple[str, ...]:
        """The moments that parameters of this group keep."""
        return self.moment_names

    def scalars(self, group: dict[str, Any], lr: Scalar, n: Scalar) -> list[Scalar]:
        """What the rule needs for the n-th update (1 is the first), from Python floats or from 0-d fp64 tensors."""
        raise NotImplementedError

    # Updating

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update from `.grad`, in a plain loop. Honours `grad_scale` and `found_inf` as torch's GradScaler sets them: gradients are
        divided by the one, and nothing changes where the other is not 0. Without them every step is applied, as in torch."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        factor = self._one if scale is None else scale.double().reciprocal().float()
        applied = found_inf == 0 if isinstance(found_inf, Tensor) else None
        self._apply(factor, applied, self._one, None, None)
        return loss

    @torch.no_grad()
    def apply(
        self,
        *,
        factor: Tensor,
        applied: Tensor,
        lr_factor: Tensor,
        clip_value: float | Tensor | None = None,
        gradients: Mapping[Tensor, Tensor] | None = None,
    ) -> None:
        """One update, or none, without waiting for a CUDA device.

        factor: 0-d fp32, multiplied into every gradient (in fp32) before use: inv_scale times the clip coefficient.
        applied: 0-d bool; where it is false no weight, master, moment or count changes by a bit, whatever the gradients hold.
        lr_factor: 0-d fp32 or fp64, multiplies each group's `lr`. clip_value: elementwise bound on factor * gradient, or None.
        gradients: parameter -> fp32 gradient, used instead of `.grad`; a parameter that is not in it is left alone.
        All 0-d tensors live on the device of the parameters.
        """
        self._apply(factor, applied, lr_factor, clip_value, gradients)

    def _apply(
        self,
        factor: Tensor,
        applied: Tensor | None,
        lr_factor: Tensor,
        clip_value: float | Tensor | None,
        gradients: Mapping[Tensor, Tensor] | None,
    ) -> None:
        bundles = self._bundles(gradients)
        if applied is not None and applied.device.type == "cpu":
            if not bool(applied):
                return
            applied = None
        if clip_value is not None and not isinstance(clip_value, Tensor):
            clip_value = self._constant(float(clip_value)).float()
        count = (self.applied_steps + 1).item() if self.applied_steps.device.type == "cpu" else self.applied_steps + 1
        known: dict[tuple[int, int, torch.dtype], Tensor] = {}
        for (index, kind, dtype, _, born), (group, since, items) in bundles.items():
            key = (index, born, wide_dtype(dtype))
            if key not in known:
                known[key] = self._scalar_tensor(group, count, since, lr_factor, wide_dtype(dtype))
            settings = engine.Settings(type(self).rule, kind, factor, clip_value, applied, known[key])
            self._run(items, settings)
        self.applied_steps += 1 if applied is None else applied

    def _run(self, items: list[engine.Item], settings: engine.Settings) -> None:
        compiled = self.execution.value == "compiled"
        try:
            engine.run(items, settings, compiled)
        except Exception as error:
            if not compiled or not engine.is_compiler_failure(error):
                raise
            text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            if self.compile is True:
                raise FewbitsError(f"compile=True, but torch.compile failed here ({text}); use compile=False or 'auto'.") from error
            self.execution = Choice("eager", f"torch.compile failed here: {text}")
            engine.run(items, settings, False)

    def _bundles(self, gradients: Mapping[Tensor, Tensor] | None) -> dict[Any, tuple[dict[str, Any], Tensor, list[engine.Item]]]:
        """Everything that has a gradient, state made where missing, grouped by what can share one call."""
        found: dict[Any, tuple[dict[str, Any], Tensor, list[engine.Item]]] = {}
        birth: list[Tensor] = []  # shared by all parameters born in this call
        for index, group in enumerate(self.param_groups):
            for parameter in group["params"]:
                gradient = parameter.grad if gradients is None else gradients.get(parameter)
                if gradient is None:
                    continue
                if gradient.layout != torch.strided:
                    raise FewbitsError("a gradient is sparse; the optimizers need dense gradients (sparse=False in the embedding).")
                if parameter not in self.state or not self.state[parameter]:
                    birth = birth or [self.applied_steps.clone()]
                    self._make_state(parameter, group, birth[0])
                state = self.state[parameter]
                kind = master.kind_for(self.master, parameter.dtype)
                key = (index, kind, parameter.dtype, gradient.dtype, id(state["since"]))
                kept = _local(state["master"]) if kind != "none" else None
                held = tuple(_local(state[name]) for name in self.group_moments(group))
                item = engine.Item(_local(parameter), _local(gradient), kept, held)
                found.setdefault(key, (group, state["since"], []))[2].append(item)
        return found

    def _make_state(self, parameter: Tensor, group: dict[str, Any], since: Tensor) -> None:
        kind = master.kind_for(self.master, parameter.dtype)
        state: dict[str, Any] = {"since": since}
        for name in self.group_moments(group):
            state[name] = moments.make(parameter)
        remainder = _fresh_remainder(parameter)
        _drop_remainder(parameter)
        if kind != "none":
            state["master"] = torch.zeros_like(parameter, dtype=master.STATE_DTYPES[kind], requires_grad=False)
            working = _local(parameter)
            kept = working if remainder is None else master.from_remainder(kind, working, remainder)
            if not (kind == "split" and remainder is None):
                _local(state["master"]).copy_(cast(Tensor, kept))
        self.state[parameter] = state

    def _scalar_tensor(self, group: dict[str, Any], count: Scalar, since: Tensor, lr_factor: Tensor, dtype: torch.dtype) -> Tensor:
        lr = group["lr"]
        if isinstance(count, Tensor):
            values = self.scalars(group, lr_factor.double() * lr, (count - since).double())
            tensors = [value if isinstance(value, Tensor) else self._constant(float(value)) for value in values]
            return torch.stack(tensors).to(dtype)
        values = self.scalars(group, float(lr) * float(lr_factor), count - int(since))
        return torch.tensor(values, dtype=torch.float64).to(dtype)

    def _constant(self, value: float) -> Tensor:
        """A 0-d fp64 tensor on the device, made once (filled there: a copy from the host would wait)."""
        if value not in self._constants:
            self._constants[value] = torch.full((), value, dtype=torch.float64, device=self.applied_steps.device)
        return self._constants[value]

    # Exact weights

    def resolve_master(self, kind: str) -> str:
        """Settles master="auto" on `kind` before the first step; refuses a kind that contradicts the one asked for. Returns the kind."""
        _check_kinds(kind, self.moments)
        if self.master == "auto" and kind != "auto":
            for group in self.param_groups:
                for parameter in group["params"]:
                    wanted, had = master.kind_for(kind, parameter.dtype), master.kind_for("auto", parameter.dtype)
                    if wanted != had and self.state.get(parameter):
                        raise FewbitsError(f"the optimizer has stepped with master={had!r} and cannot change to {kind!r}; settle it before the first step.")
            self.master = kind
        elif kind not in ("auto", self.master):
            raise FewbitsError(f"the optimizer was made with master={self.master!r} and is asked for {kind!r}; use the same kind, or 'auto' in one of them.")
        return self.master

    def master_kind(self, parameter: Tensor) -> str:
        """What this parameter keeps: "fp32", "split" or "none"."""
        return master.kind_for(self.master, parameter.dtype)

    @torch.no_grad()
    def exact_weight(self, parameter: Tensor) -> Tensor:
        """A copy of the exact weight: fp32 (fp64 for an fp64 parameter), with the parameter's shape and placement."""
        kind, state = self.master_kind(parameter), self.state.get(parameter)
        working = _local(parameter)
        if state:
            kept = _local(state["master"]) if kind != "none" else None
        else:
            remainder = _fresh_remainder(parameter)
            if remainder is None:
                return _placed(parameter, working.to(wide_dtype(working.dtype), copy=True))
            if kind == "none":
                kept = None
            else:
                kept = master.from_remainder(kind, working, remainder)
        return _placed(parameter, master.read(kind, working, kept).clone())

    @torch.no_grad()
    def load_exact(self, parameter: Tensor, tensor: Tensor) -> None:
        """Sets the weight to an exact value of its shape (fp32, fp64 or the parameter's own dtype): the working weight and the master.
        Before the first step the remainder waits on the parameter (`fewbits_remainder`) for its state to be made."""
        if tensor.shape != parameter.shape:
            raise FewbitsError(f"an exact weight of shape {tuple(tensor.shape)} came for a parameter of shape {tuple(parameter.shape)}.")
        kind, state, working = self.master_kind(parameter), self.state.get(parameter), _local(parameter)
        exact = _local(tensor).to(device=working.device, dtype=wide_dtype(working.dtype))
        new_working, kept = master.rounded(kind, exact, working.dtype)
        working.copy_(new_working)
        _drop_remainder(parameter)
        if kept is not None and state:
            _local(state["master"]).copy_(kept)
        elif kept is not None:
            parameter.fewbits_remainder = kept.clone()  # type: ignore[attr-defined]
            parameter.fewbits_version = parameter._version  # type: ignore[attr-defined]

    # State

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's, after checking options and dtypes."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self.check_group(group)
            for parameter in group["params"]:
                master.kind_for(self.master, parameter.dtype)
        except FewbitsError:
            self.param_groups.pop()
            raise

    def state_dict(self) -> dict[str, Any]:
        """torch's state dict with `applied_steps` (0-d int64) and `kinds` (what the state is made of) beside `state` and `param_groups`."""
        return {**super().state_dict(), "applied_steps": self.applied_steps.clone(), "kinds": self._kinds()}

    def _kinds(self) -> dict[str, str]:
        return {"optimizer": type(self).__name__, "master": self.master, "moments": self.moments}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # type: ignore[override]
        """Restores what `state_dict` gave, each tensor in its own dtype; refuses state of another optimizer, kind or shape and then changes nothing."""
        if "applied_steps" not in state_dict or "kinds" not in state_dict:
            raise FewbitsError("this is not the state of a fewbits optimizer (applied_steps is missing); load the state_dict() of one.")
        saved, own = state_dict["kinds"], self._kinds()
        for what in ("optimizer", "moments"):
            if saved.get(what) != own[what]:
                raise FewbitsError(f"the saved state has {what} {saved.get(what)!r} and this optimizer has {own[what]!r}; make it as it was saved.")
        groups = state_dict["param_groups"]
        sizes = [len(group["params"]) for group in groups]
        if sizes != [len(group["params"]) for group in self.param_groups]:
            raise FewbitsError(
                f"the saved state has parameter groups of {sizes} and this optimizer of {[len(g['params']) for g in self.param_groups]}; group them as they were saved."
            )
        numbered = zip((n for g in groups for n in g["params"]), ((g, p) for g in self.param_groups for p in g["params"]), strict=True)
        fresh: dict[Tensor, dict[str, Tensor]] = {}
        births: dict[int, Tensor] = {}
        for (number, (_, parameter)), group in zip(numbered, (g for g in groups for _ in g["params"]), strict=True):
            if state_dict["state"].get(number):
                fresh[parameter] = self._restored(parameter, group, state_dict["state"][number], births)
        super().load_state_dict({"state": {}, "param_groups": groups})
        for parameter, state in fresh.items():
            _drop_remainder(parameter)
            self.state[parameter] = state
        self.applied_steps.copy_(state_dict["applied_steps"])

    def _restored(self, parameter: Tensor, group: dict[str, Any], saved: Mapping[str, Any], births: dict[int, Tensor]) -> dict[str, Tensor]:
        kind = self.master_kind(parameter)
        dtypes = {name: wide_dtype(parameter.dtype) for name in self.group_moments(group)}
        if kind != "none":
            dtypes["master"] = master.STATE_DTYPES[kind]
        if set(saved) != {*dtypes, "since"}:
            raise FewbitsError(
                f"the saved state of a {parameter.dtype} parameter holds {sorted(saved)}; master={self.master!r} here needs {sorted({*dtypes, 'since'})}."
            )
        state: dict[str, Tensor] = {}
        for name, dtype in dtypes.items():
            value = saved[name]
            if value.dtype != dtype or value.shape != parameter.shape:
                raise FewbitsError(
                    f"the saved {name} is {value.dtype} {tuple(value.shape)}; here it is {dtype} {tuple(parameter.shape)}: make the optimizer as it was saved."
                )
            state[name] = torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
            state[name].copy_(value)
        born = int(saved["since"])
        state["since"] = births.setdefault(born, torch.full_like(self.applied_steps, born))
        return state

    @torch.no_grad()
    def named_state(self, named_parameters: Iterable[tuple[str, Tensor]], masters: bool = False) -> dict[str, Tensor]:
        """The state as one flat dict: "NAME/exp_avg" and so on, and "applied_steps". Tensors are the live ones. The masters are left out unless
        asked for: `exact_weight` is what a checkpoint stores."""
        tensors = {"applied_steps": self.applied_steps}
        for name, parameter in named_parameters:
            for key, value in (self.state.get(parameter) or {}).items():
                if masters or key != "master":
                    tensors[f"{name}/{key}"] = value
        return tensors

    @torch.no_grad()
    def load_named_state(self, named_parameters: Iterable[tuple[str, Tensor]], tensors: Mapping[str, Tensor]) -> None:
        """Restores what `named_state` gave, exactly. Masters that are not among `tensors` stay what they are: call `load_exact` for the weights
        before or after."""
        groups = {parameter: group for group in self.param_groups for parameter in group["params"]}
        named = [(name, parameter) for name, parameter in named_parameters if parameter in groups]
        known = {name for name, _ in named}
        foreign = sorted({key.rpartition("/")[0] for key in tensors if key != "applied_steps"} - known)
        if foreign or "applied_steps" not in tensors:
            what = f"state for {foreign[0]!r}, which this model does not have" if foreign else "no applied_steps"
            raise FewbitsError(f"the saved optimizer state holds {what}; load it into the model and optimizer that wrote it.")
        births: dict[int, Tensor] = {}
        fresh: dict[Tensor, dict[str, Tensor]] = {}
        for name, parameter in named:
            saved = {key.rpartition("/")[2]: value for key, value in tensors.items() if key.rpartition("/")[0] == name}
            if not saved:
                continue
            if self.master_kind(parameter) != "none" and "master" not in saved:
                if not self.state.get(parameter):
                    self._make_state(parameter, groups[parameter], self.applied_steps.clone())
                saved["master"] = self.state[parameter]["master"]
            fresh[parameter] = self._restored(parameter, groups[parameter], saved, births)
        for _, parameter in named:
            self.state.pop(parameter, None)
        self.state.update(fresh)
        self.applied_steps.copy_(tensors["applied_steps"])

    def __getstate__(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("master", "moments", "compile", "execution", "applied_steps", "_one", "_constants")}
        return {**super().__getstate__(), **own}


def _check_kinds(master_kind: str, moment_kind: str) -> None:
    master.check_kind(master_kind)
    moments.check_kind(moment_kind)


def _local(tensor: Tensor) -> Tensor:
    """The tensor this rank holds, detached, sharing memory and version counter."""
    return (tensor._local_tensor if isinstance(tensor, DTensor) else tensor).detach()


def _placed(parameter: Tensor, local: Tensor) -> Tensor:
    """`local` as a tensor placed like `parameter`."""
    if not isinstance(parameter, DTensor):
        return local
    return DTensor.from_local(
        local, parameter.device_mesh, parameter.placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
    )


def _fresh_remainder(parameter: Tensor) -> Tensor | None:
    """The remainder that waits on the parameter, unless the weight was changed since it was left there."""
    remainder = getattr(parameter, "fewbits_remainder", None)
    if remainder is None or getattr(parameter, "fewbits_version", None) != parameter._version:
        return None
    return cast(Tensor, _local(remainder))


def _drop_remainder(parameter: Tensor) -> None:
    for name in ("fewbits_remainder", "fewbits_version"):
        if hasattr(parameter, name):
            delattr(parameter, name)


def check_number(name: str, value: Any) -> None:
    """Raises FewbitsError unless `value` is a finite number of at least 0 (a 0-d tensor, such as torch's schedulers accept for lr, passes)."""
    if isinstance(value, Tensor):
        return
    if isinstance(value, bool) or not isinstance(value, float | int) or not 0 <= value < math.inf:
        raise FewbitsError(f"{name}={value!r} does not fit; use a finite number of at least 0.")
