"""The optimizer that holds exact weights: state, masters, the applied-step count; adamw.py and sgd.py add the rule.

`step()` is for plain loops (torch's schedulers and GradScaler work); `apply()` is what a training step calls: unscaling
and clipping are one factor inside the update, and whether it happens at all is a 0-d bool on the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from fewbits.choice import Choice
from fewbits.errors import FewbitsError
from fewbits.kernels.dispatch import updates_in_one_pass
from fewbits.kernels.update import Cut, norm
from fewbits.nn import remainder
from fewbits.numerics.wide import wide_dtype
from fewbits.optim import bundles, clip, engine, master, moments, sharding
from fewbits.optim.bundles import Bundle, Tables
from fewbits.optim.saved import Copies, by_name, check_state_dict
from fewbits.optim.sharding import local
from fewbits.precision.kinds import check_master, check_moments

Scalar = float | Tensor


class Optimizer(torch.optim.Optimizer):
    """Base of AdamW, Adam and SGD. Not for use by itself.

    State per parameter, made at the first update with a gradient: the moments (`moment_names`; fp32, fp64 for fp64),
    `master` (see master.py) and `since`, the number of applied steps before its birth (0-d int64). Moments and master
    are shaped, placed and sharded like the parameter.
    """

    _step_supports_amp_scaling = True  # torch's GradScaler then hands over grad_scale and found_inf, and does not wait
    moment_names: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        master: str = "auto",
        moments: str = "fp32",
        compile: bool | str = "auto",
    ) -> None:
        self.master = check_master(master)
        self.moments = check_moments(moments)
        self.compile = compile
        params = [params] if isinstance(params, Tensor) else list(params)
        if not params:
            raise FewbitsError("the optimizer got no parameters; pass model.parameters() or model.named_parameters().")
        super().__init__(params, defaults)
        device = self.param_groups[0]["params"][0].device
        self.execution: Choice = engine.choose_execution(compile, device)
        self.applied_steps: Tensor = torch.zeros((), dtype=torch.int64, device=device)
        self._one: Tensor = torch.ones((), device=device)
        self._constants: dict[float, Tensor] = {}
        self._tables: Tables | None = None
        self.cut = Cut()

    # What a subclass defines

    @staticmethod
    def rule(weight: Tensor, gradient: Tensor, moments: Sequence[Tensor], scalars: Tensor) -> None:
        """The update, in place, of tensors of one shape and one dtype (see numerics/update.py)."""
        raise NotImplementedError

    def cpu_rule(self, group: dict[str, Any], lr: float, n: int) -> engine.Rule | None:
        """A faster twin of `rule` for eager CPU code, for the n-th update, or None. It need not look at the scalars."""
        return None

    def check_group(self, group: dict[str, Any]) -> None:
        """Raises FewbitsError for options that do not fit."""

    def group_moments(self, group: dict[str, Any]) -> tuple[str, ...]:
        """The moments that parameters of this group keep."""
        return self.moment_names

    def scalars(self, group: dict[str, Any], lr: Scalar, n: Scalar) -> list[Scalar]:
        """What the rule needs for the n-th update (the first is 1), from Python floats or from 0-d fp64 tensors."""
        raise NotImplementedError

    # Updating

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update from `.grad`, in a plain loop.

        Honours `grad_scale` and `found_inf` as torch's GradScaler sets them: gradients are divided by the one, and
        nothing changes where the other is not 0. Without them every step is applied, as in torch.
        """
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
        gradients: Mapping[Any, Tensor] | None = None,
    ) -> None:
        """One update, or none, without waiting for a CUDA device.

        Args:
            factor: 0-d fp32, multiplied into every gradient (in fp32) before use: inv_scale times the clip coefficient.
            applied: 0-d bool; where false no weight, master, moment or count changes by a bit, whatever the gradients
            are.
            lr_factor: 0-d fp32 or fp64, multiplies each group's `lr`.
            clip_value: elementwise bound on factor * gradient, or None.
            gradients: parameter -> gradient, used instead of `.grad`; a parameter that is not in it is left alone.

        All 0-d tensors live on the device of the parameters.
        """
        self._apply(factor, applied, lr_factor, clip_value, gradients)

    @torch.no_grad()
    def grad_norm(self, gradients: Mapping[Any, Tensor], kind: str = "norm") -> Tensor:
        """`clip.measure` of the gradients of this optimizer's parameters, by one launch where the kernel runs.

        gradients: parameter -> gradient, as for `apply`.
        """
        if self.execution.value == "kernel":
            tables = self._current_tables(gradients)
            if tables.tables and tables.whole and not tables.rest:
                return norm(tables.tables, clip.check_kind(kind))
        return clip.measure(list(gradients.values()), kind)

    def _apply(
        self,
        factor: Tensor,
        applied: Tensor | None,
        lr_factor: Tensor,
        clip_value: float | Tensor | None,
        gradients: Mapping[Any, Tensor] | None,
    ) -> None:
        tables = self._current_tables(gradients) if self.execution.value == "kernel" else None
        found = self._bundles(gradients) if tables is None else tables.rest
        if applied is not None and applied.device.type == "cpu":
            if not bool(applied):
                return
            applied = None
        if clip_value is not None and not isinstance(clip_value, Tensor):
            clip_value = self._constant(float(clip_value)).float()
        if tables is not None:
            self._run_tables(tables, factor, applied, lr_factor, clip_value)
        if found:
            self._run_bundles(found, factor, applied, lr_factor, clip_value)
        self.applied_steps += 1 if applied is None else applied

    def _run_bundles(
        self,
        found: Mapping[Any, Bundle],
        factor: Tensor,
        applied: Tensor | None,
        lr_factor: Tensor,
        clip_value: Tensor | None,
    ) -> None:
        count: Scalar = self.applied_steps + 1
        if self.applied_steps.device.type == "cpu":
            count = int(self.applied_steps) + 1
        known: dict[Any, tuple[engine.Rule, Tensor]] = {}
        for (index, kind, dtype, _, born), bundle in found.items():
            item = bundle.items[0]
            one_pass = updates_in_one_pass(type(self).rule, item.working, item.gradient)
            key = (index, born, wide_dtype(dtype), one_pass)
            if key not in known:
                known[key] = self._rule_and_scalars(bundle, count, lr_factor, wide_dtype(dtype), one_pass)
            rule, scalars = known[key]
            self._run(bundle.items, engine.Settings(rule, kind, factor, clip_value, applied, scalars))

    def _current_tables(self, gradients: Mapping[Any, Tensor] | None) -> Tables:
        """The tables of the parameters and gradients as they lie now, made anew where something other than a gradient moved.

        Tables with a rest serve this call alone: they hold its gradients.
        """
        where = bundles.layout(self.param_groups, self.state, gradients, self.group_moments)
        if self._tables is not None and where is not None and self._tables.follow(where):
            return self._tables
        found = self._bundles(gradients)
        where = where or bundles.layout(self.param_groups, self.state, gradients, self.group_moments)
        assert where is not None  # state is there now, and `_bundles` has refused sparse gradients
        tables = Tables(where, found, type(self).rule, list(self.defaults), self.cut)
        self._tables = None if tables.rest else tables
        return tables

    def _run_tables(
        self, tables: Tables, factor: Tensor, applied: Tensor | None, lr_factor: Tensor, clip_value: Tensor | None
    ) -> None:
        if not tables.tables:
            return
        scalars = tables.scalars.values(self.scalars, self.applied_steps + 1, lr_factor)
        always = self._one > 0 if applied is None else applied
        limit = None if clip_value is None else clip_value.float()
        for table in tables.tables:
            table.update(scalars, factor.float(), limit, always)
        torch.autograd.graph.increment_version(tables.weights)  # a backward that would use stale weights says so

    def _run(self, items: list[engine.Item], settings: engine.Settings) -> None:
        for part in engine.parts(items):  # so that a compiler that fails late makes nothing update twice
            compiled = self.execution.value == "compiled"
            try:
                engine.run(part, settings, compiled)
            except Exception as error:
                if not compiled or not engine.is_compiler_failure(error):
                    raise
                text = (str(error).strip() or type(error).__name__).splitlines()[0]
                if self.compile is True:
                    raise FewbitsError(f"compile=True, but torch.compile failed: {text} Use compile=False.") from error
                self.execution = Choice("eager", f"torch.compile failed here: {text}")
                engine.run(part, settings, False)

    def _bundles(self, gradients: Mapping[Any, Tensor] | None) -> dict[Any, Bundle]:
        """Everything that has a gradient, state made where missing, grouped by what can share one call."""
        found: dict[Any, Bundle] = {}
        place = 0
        since: Tensor | None = None  # shared by all parameters born in this call
        for index, group in enumerate(self.param_groups):
            for parameter in group["params"]:
                gradient = parameter.grad if gradients is None else gradients.get(parameter)
                if gradient is None:
                    continue
                if gradient.layout != torch.strided:
                    raise FewbitsError("a gradient is sparse; use dense gradients (sparse=False in the embedding).")
                if not self.state.get(parameter):
                    since = self.applied_steps.clone() if since is None else since
                    self._make_state(parameter, group, since)
                state = self.state[parameter]
                kept = local(state["master"]) if "master" in state else None
                held = tuple(local(state[name]) for name in self.group_moments(group))
                kind = self.master_kind(parameter)
                key = (index, kind, parameter.dtype, gradient.dtype, id(state["since"]))
                bundle = found.setdefault(key, Bundle(group, state["since"], []))
                bundle.items.append(engine.Item(local(parameter), local(gradient), kept, held, place))
                place += 1
        return found

    def _make_state(self, parameter: Tensor, group: dict[str, Any], since: Tensor) -> None:
        state: dict[str, Any] = {"since": since}
        for name in self.group_moments(group):
            state[name] = moments.make(parameter)
        kind, kept = self.master_kind(parameter), self._kept(parameter)
        if kept is not None:
            state["master"] = torch.zeros_like(parameter, dtype=master.STATE_DTYPES[kind], requires_grad=False)
            local(state["master"]).copy_(kept)
        remainder.drop(parameter)
        self.state[parameter] = state

    def _rule_and_scalars(
        self, bundle: Bundle, count: Scalar, lr_factor: Tensor, dtype: torch.dtype, one_pass: bool
    ) -> tuple[engine.Rule, Tensor]:
        group = bundle.group
        rule: engine.Rule = type(self).rule
        if isinstance(count, Tensor):
            values = self.scalars(group, lr_factor.double() * group["lr"], (count - bundle.since).double())
            tensors = [value if isinstance(value, Tensor) else self._constant(float(value)) for value in values]
            return rule, torch.stack(tensors).to(dtype)
        lr, n = float(group["lr"]) * float(lr_factor), int(count) - int(bundle.since)
        if self.execution.value == "eager" and not one_pass:
            rule = self.cpu_rule(group, lr, n) or rule
        return rule, torch.tensor(self.scalars(group, lr, n), dtype=torch.float64).to(dtype)

    def _constant(self, value: float) -> Tensor:
        """A 0-d fp64 tensor on the device, made once (filled there: a copy from the host would wait)."""
        if value not in self._constants:
            device = self.applied_steps.device
            self._constants[value] = torch.full((), value, dtype=torch.float64, device=device)
        return self._constants[value]

    # Exact weights

    def resolve_master(self, kind: str) -> str:
        """Settles master="auto" by what the precision asks for ("fp32", "split", "none"); returns the kind in force.

        A kind that the user gave to the optimizer stands if both keep exact weights or both keep none; fp32 and split
        differ in memory only. Raises FewbitsError if one keeps exact weights and the other none, or if state of
        another kind exists.
        """
        settled = "auto" if check_master(kind) == "split" else kind  # auto is split, and fp32 for a parameter in fp16
        for group in self.param_groups:
            for parameter in group["params"]:
                wanted, had = master.kind_for(settled, parameter.dtype), self.master_kind(parameter)
                if self.master != "auto" and (wanted == "none") != (had == "none"):
                    raise FewbitsError(
                        f"the optimizer was made with master={self.master!r} and the precision asks for {kind!r}; "
                        "use master='auto', or a precision that fits."
                    )
                if self.master == "auto" and wanted != had and self.state.get(parameter):
                    raise FewbitsError(f"the optimizer has stepped with master {had!r} and cannot change to {kind!r}.")
        if self.master == "auto":
            self.master = settled
        return self.master

    def master_kind(self, parameter: Tensor) -> str:
        """What is kept beside this parameter: "fp32", "split" or "none"."""
        return master.kind_for(self.master, parameter.dtype)

    @torch.no_grad()
    def exact_weight(self, parameter: Tensor) -> Tensor:
        """A copy of the exact weight: fp32 (fp64 for an fp64 parameter), with the parameter's shape and placement."""
        kind = self.master_kind(parameter)
        exact = master.read(kind, local(parameter), self._kept(parameter))
        return sharding.placed(exact.clone(), parameter)

    def _kept(self, parameter: Tensor) -> Tensor | None:
        """What is kept beside the parameter (local): from its state or, before that is made, what it will adopt."""
        kind, state, working = self.master_kind(parameter), self.state.get(parameter), local(parameter)
        if kind == "none":
            return None
        if state:
            return local(state["master"])
        left = master.waiting_remainder(parameter)
        if left is not None:
            return master.from_remainder(kind, working, left)
        return torch.zeros_like(working, dtype=torch.int16) if kind == "split" else working.float()

    @torch.no_grad()
    def load_exact(self, parameter: Tensor, tensor: Tensor) -> None:
        """Sets the weight to an exact value of its shape (any float dtype): the working weight and the master.

        Before the first step the remainder waits on the parameter until its state is made.
        """
        if tensor.shape != parameter.shape:
            raise FewbitsError(f"an exact weight {tuple(tensor.shape)} came for a parameter {tuple(parameter.shape)}.")
        kind, working = self.master_kind(parameter), local(parameter)
        exact = local(tensor).to(device=working.device, dtype=wide_dtype(working.dtype))
        new_working, kept = master.rounded(kind, exact, working.dtype)
        working.copy_(new_working)
        remainder.drop(parameter)
        if kept is not None and self.state.get(parameter):
            local(self.state[parameter]["master"]).copy_(kept)
        elif kept is not None:
            master.leave_remainder(parameter, kept.clone())

    # State

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's, after checking options and dtypes."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self.check_group(group)
            for parameter in group["params"]:
                self.master_kind(parameter)
        except FewbitsError:
            self.param_groups.pop()
            raise

    def state_dict(self) -> dict[str, Any]:
        """torch's state dict, and beside it `applied_steps` (0-d int64) and `kinds` (what the state is made of)."""
        return {**super().state_dict(), "applied_steps": self.applied_steps.clone(), "kinds": self._kinds()}

    def _kinds(self) -> dict[str, str]:
        return {"optimizer": type(self).__name__, "master": self.master, "moments": self.moments}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` gave, each tensor in its own dtype.

        Raises FewbitsError for state of another optimizer, kind or shape, before anything is changed.
        """
        check_state_dict(state_dict, self._kinds(), [len(group["params"]) for group in self.param_groups])
        groups, saved = state_dict["param_groups"], state_dict["state"]
        fresh: dict[Tensor, dict[str, Tensor]] = {}
        copies = Copies(self.applied_steps.device)
        for saved_group, group in zip(groups, self.param_groups, strict=True):
            names = self.group_moments(saved_group)
            for number, parameter in zip(saved_group["params"], group["params"], strict=True):
                if saved.get(number):
                    fresh[parameter] = copies.copy(parameter, self.master_kind(parameter), names, saved[number])
        super().load_state_dict(
            {"state": {}, "param_groups": groups}
        )  # torch would cast the state to the parameter's dtype
        for parameter, state in fresh.items():
            remainder.drop(parameter)
            self.state[parameter] = state
        self.applied_steps.copy_(state_dict["applied_steps"])

    @torch.no_grad()
    def named_state(self, named_parameters: Iterable[tuple[str, Tensor]], masters: bool = False) -> dict[str, Tensor]:
        """The state as one flat dict: "NAME/exp_avg" and so on, and "applied_steps".

        Moments (and masters) are the live tensors, not copies. Masters are left out unless asked for: a checkpoint
        stores `exact_weight`, which says it all.
        """
        tensors = {"applied_steps": self.applied_steps.clone()}
        for name, parameter in named_parameters:
            for key, value in (self.state.get(parameter) or {}).items():
                if masters or key != "master":
                    tensors[f"{name}/{key}"] = value.clone() if key == "since" else value
        return tensors

    @torch.no_grad()
    def load_named_state(self, named_parameters: Iterable[tuple[str, Tensor]], tensors: Mapping[str, Tensor]) -> None:
        """Restores what `named_state` gave, exactly.

        Without masters among `tensors` the exact weights stay what they are: give them to `load_exact`.
        """
        groups = {parameter: group for group in self.param_groups for parameter in group["params"]}
        named = [(name, parameter) for name, parameter in named_parameters if parameter in groups]
        saved = by_name(tensors, [name for name, _ in named])
        copies = Copies(self.applied_steps.device)
        fresh: dict[Tensor, dict[str, Tensor]] = {}
        for name, parameter in named:
            if name in saved:
                kept = self._kept(parameter)
                own = {} if kept is None else {"master": sharding.placed(kept, parameter)}
                kind, names = self.master_kind(parameter), self.group_moments(groups[parameter])
                fresh[parameter] = copies.copy(parameter, kind, names, {**own, **saved[name]})
        for _, parameter in named:
            if parameter in fresh:
                remainder.drop(parameter)
                self.state[parameter] = fresh[parameter]
            elif self.state.get(parameter):  # not born in the saved state: its exact weight waits again
                exact = self.exact_weight(parameter)
                del self.state[parameter]
                self.load_exact(parameter, exact)
        self.applied_steps.copy_(tensors["applied_steps"])

    def __getstate__(self) -> dict[str, Any]:
        names = ("master", "moments", "compile", "execution", "applied_steps", "_one", "_constants", "cut")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in names}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "_tables": None})  # addresses mean nothing elsewhere


def check_number(name: str, value: Any) -> None:
    """Raises FewbitsError unless `value` is a finite number of at least 0 (or a tensor, which torch allows for lr)."""
    if isinstance(value, Tensor):
        return
    if isinstance(value, bool) or not isinstance(value, float | int) or not 0 <= value < math.inf:
        raise FewbitsError(f"{name}={value!r} does not fit; use a finite number of at least 0.")
