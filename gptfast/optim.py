"""Optimizers over the fused ops, with the constructors and `state_dict`s of `torch.optim`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from gptfast.ops.adamw import Settings, adamw_fwd, is_capturing
from gptfast.ops.library import statistics_dtype

MOMENTS = ("exp_avg", "exp_avg_sq")


class AdamW(torch.optim.Optimizer):
    """AdamW; replaces `torch.optim.AdamW` and `torch.nn.utils.clip_grad_norm_` before it.

    w <- w - lr weight_decay w - lr / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps)

    A step takes at most three kernel launches on a GPU for any number of tensors, of any mixture of
    dtypes and groups, and never waits for the device.

    Args:
        params: parameters, (name, parameter) pairs, or groups of them, as in torch. float32,
            bfloat16 or float16 (float64 on the torch backend), all on one device.
        lr, betas, eps, weight_decay, maximize: as in torch, for each group. lr may be a float32
            tensor; on a GPU it is read there.
        amsgrad, differentiable: only False.
        foreach, fused, capturable: as in torch, where they choose between implementations; here
            there is one, which is fused, and capturable wherever its device is. They are accepted
            and change nothing.
        max_norm: clip the norm of all gradients together to this, as `clip_grad_norm_` with
            `error_if_nonfinite=False` does: after an infinite or NaN norm parameters are NaN.
            `math.inf` measures and does not clip. None does neither, and reads the gradients once
            less.
        stochastic_rounding: round bfloat16 parameters up or down at random, so that the mean is
            right and small steps are not lost, with no master copy. The seed is drawn from
            PyTorch's generator at the first step. Runs on the CUDA kernels or the reference.
        master_weights: keep an fp32 copy of each half-precision parameter, update that, and round
            it to the parameter.

    Attributes:
        total_norm: the norm before clipping in the last step, a float32 scalar tensor on the
            device; None before the first step and without `max_norm`.

    Raises:
        TypeError: a parameter is not floating point, or lr is a tensor of another dtype.
        ValueError: a setting out of range, or parameters on several devices.
        RuntimeError: from `step`, for sparse gradients; or a backend is forced and refuses; or a
            CUDA graph captures a parameter's first step, or the first that rounds at random.

    Limits:
        Gradients are left as they were, clipped or unscaled only on the way. The two moments are
        fp32 for half-precision parameters too. State dicts go to and from `torch.optim.AdamW`,
        which however keeps moments in the parameter's dtype and knows no master copies. Parameters
        with gaps in memory (a slice of a wider tensor) go through the reference; so do all others
        of that optimizer. DTensors are not supported. A CUDA graph of a step repeats the settings
        that were captured, but for an lr on the device, which is read at every replay.

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019.
    """

    _step_supports_amp_scaling = True  # GradScaler then leaves its scale and verdict on the object

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        max_norm: float | None = None,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
    ) -> None:
        if foreach and fused:
            raise ValueError("AdamW: foreach and fused must not both be True")
        if master_weights and stochastic_rounding:
            raise ValueError("AdamW: stochastic_rounding must be False with master_weights")
        if max_norm is not None and not max_norm >= 0:
            raise ValueError(f"AdamW: max_norm must be at least 0 or None, got {max_norm}")
        self.max_norm = None if max_norm is None else float(max_norm)
        self.master_weights = master_weights
        self.stochastic_rounding = stochastic_rounding
        self.rounding_seed: torch.Tensor | None = None
        self.total_norm: torch.Tensor | None = None
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": True,  # tells torch's AdamW that steps are tensors on the device
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, with the settings of the constructor where it has none of its own."""
        super().add_param_group(param_group)
        try:
            self._check_group(self.param_groups[-1])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def _check_group(self, group: dict[str, Any]) -> None:
        lr = group["lr"]
        if isinstance(lr, torch.Tensor) and (lr.numel() != 1 or lr.dtype != torch.float32):
            raise TypeError(
                f"AdamW: lr must be a number or one float32, got {tuple(lr.shape)} {lr.dtype}"
            )
        if isinstance(lr, torch.Tensor) and lr.device.type != "cpu":
            for p in group["params"]:
                if p.device != lr.device:
                    raise ValueError(
                        f"AdamW: lr must be on the CPU or on {p.device}, where the parameters are, "
                        f"got {lr.device}"
                    )
        for name in ("lr", "eps", "weight_decay"):
            value = group[name]
            on_device = isinstance(value, torch.Tensor) and value.device.type != "cpu"
            if not on_device and not value >= 0:
                raise ValueError(f"AdamW: {name} must be at least 0, got {value}")
        if not all(0 <= beta < 1 for beta in group["betas"]):
            raise ValueError(f"AdamW: betas must be in [0, 1), got {group['betas']}")
        for name in ("amsgrad", "differentiable"):
            if group.get(name):
                raise ValueError(f"AdamW: {name} must be False, got {group[name]}")
        if group.get("decoupled_weight_decay") is False:
            raise ValueError("AdamW: weight decay must be decoupled, got the state of an Adam")
        first = next((p for g in self.param_groups for p in g["params"]), None)
        for p in group["params"]:
            if not p.is_floating_point():
                raise TypeError(f"AdamW: parameters must be floating point, got {p.dtype}")
            if first is not None and p.device != first.device:
                raise ValueError(f"AdamW: parameters must be on {first.device}, got {p.device}")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step on the gradients that are there.

        Args:
            closure: computes the loss anew; its result is returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        params: list[torch.Tensor] = []
        grads: list[torch.Tensor] = []
        groups: list[int] = []
        hyper: list[float] = []
        lrs: list[torch.Tensor] = []
        for number, group in enumerate(self.param_groups):
            lr, (beta1, beta2) = group["lr"], group["betas"]
            on_device = isinstance(lr, torch.Tensor) and lr.device.type != "cpu"
            settings = (beta1, beta2, group["eps"], group["weight_decay"], group["maximize"])
            hyper += Settings(*map(float, (0.0 if on_device else lr, *settings)))
            lrs.append(lr if on_device else torch.empty(0))
            with_grad = [p for p in group["params"] if p.grad is not None]
            params += with_grad
            grads += [p.grad for p in with_grad]
            groups += [number] * len(with_grad)
            for p in with_grad:
                self._check_gradient(p)
        if not params:
            return loss
        states = [self.state.get(p) or self._new_state(p) for p in params]
        if self.stochastic_rounding and self.rounding_seed is None:
            if is_capturing(params[0].device):  # every replay would draw another
                raise RuntimeError(
                    "AdamW: stochastic_rounding must have drawn its seed, in a first step, before "
                    "one is captured in a CUDA graph"
                )
            self.rounding_seed = torch.randint(2**63 - 1, (), device=params[0].device)
        empty = torch.empty(0)
        norm = adamw_fwd(
            params,
            grads,
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [s["step"] for s in states],
            [s.get("master", empty) for s in states] if self.master_weights else [],
            groups,
            hyper,
            lrs if any(lr.numel() for lr in lrs) else [],
            self.max_norm,
            getattr(self, "grad_scale", None),
            getattr(self, "found_inf", None),
            *(() if self.rounding_seed is None else (self.rounding_seed,)),
        )
        self.total_norm = None if self.max_norm is None else norm
        return loss

    def _check_gradient(self, p: torch.Tensor) -> None:
        if p.grad is not None and p.grad.layout != torch.strided:
            raise RuntimeError(f"AdamW: gradients must be dense, got {p.grad.layout}")

    def _new_state(self, p: torch.Tensor) -> dict[str, Any]:
        if is_capturing(p.device):  # zeros would become part of the graph, and every replay's start
            raise RuntimeError(
                "AdamW: every parameter must have had a step before one is captured in a CUDA "
                f"graph, got one of {tuple(p.shape)} that had none"
            )
        dtype = statistics_dtype(p.dtype)
        state = self.state[p]
        state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
        for name in MOMENTS:
            state[name] = torch.zeros_like(p, dtype=dtype)
        if self.master_weights and p.dtype != dtype:
            state["master"] = p.detach().to(dtype)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copy the state of this class or of `torch.optim.AdamW`; see `torch.optim.Optimizer`.

        Moments and master copies are taken as they are saved, in fp32: torch would round them to
        the parameter's dtype. A master copy that is missing is made from the parameter.

        Raises:
            ValueError: groups of other sizes, tensors of other shapes, or settings out of range.
        """
        saved: dict[str, Any] = {}
        # Runs behind the hooks that a user has registered, which may have changed the state.
        handle = self.register_load_state_dict_pre_hook(lambda _, state: saved.update(state))
        before = (self.state, self.param_groups)
        try:
            super().load_state_dict(state_dict)
            ids = [i for group in saved["param_groups"] for i in group["params"]]
            params = [p for group in self.param_groups for p in group["params"]]
            for group in self.param_groups:
                group["fused"] = True
                self._check_group(group)
            for i, p in zip(ids, params, strict=True):
                if i in saved["state"]:
                    self._load_state(p, saved["state"][i])
        except BaseException:
            self.state, self.param_groups = before
            raise
        finally:
            handle.remove()

    def _load_state(self, p: torch.Tensor, given: dict[str, Any]) -> None:
        self.state[p] = {}
        state = self._new_state(p)
        state["step"].copy_(torch.as_tensor(given["step"]))
        for name in (*MOMENTS, "master"):
            if name in state and name in given:
                if given[name].shape != p.shape:
                    raise ValueError(
                        f"AdamW: {name} must be {tuple(p.shape)}, got {tuple(given[name].shape)}"
                    )
                state[name].copy_(given[name])
