"""Norms first, layer by layer, then one backward pass of the weighted losses (Li et al. 2022, arXiv 2110.05679).

Nothing but the norms is kept of a patient's gradient. Opacus' samplers compute the gradient of a layer's rows; rows of
a patient are added before the norm is taken. Exact only because no patient's loss depends on another's rows, and only
in full precision: what is measured and what is added come from two passes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.layers import GroupNorm, GroupNorm1
from torch import Tensor, nn
from torch.func import functional_call, vmap

from fedssl.methods.separable import SeparableMethod
from fedssl.privacy.engines.base import Autocast, Engine, Gradients
from fedssl.privacy.engines.vectorised import stacked
from fedssl.privacy.mechanism import clip_factor

_CHUNK = 16
_ROUNDING = 1e-4  # between the norms and what the second pass adds
_KNOWN = {nn.Conv2d: nn.Conv2d, nn.Linear: nn.Linear, nn.LayerNorm: nn.LayerNorm, nn.GroupNorm: nn.GroupNorm}
_KNOWN |= {GroupNorm: nn.GroupNorm, GroupNorm1: nn.GroupNorm}  # exact classes: others compute otherwise


@dataclass
class _Seen:
    """What one layer saw and gave, call by call, while the network ran."""

    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)


class _PointsLoss(nn.Module):
    """The loss of one patient's points as a module, whose own parameters can be given."""

    def __init__(self, method: SeparableMethod) -> None:
        super().__init__()
        self.method = method

    def forward(self, points: Sequence[Tensor], there: Tensor) -> Tensor:
        return self.method.patient_loss(points, there)


class Ghost(Engine):
    """Runs ``_CHUNK`` patients at once, and each layer's gradient by patient for a moment."""

    def __init__(self, method: SeparableMethod, autocast: Autocast) -> None:
        super().__init__(method, autocast)
        self.layers = {
            name: layer
            for name, layer in method.named_modules()
            if any(value.requires_grad for value in layer.parameters(recurse=False)) and layer is not method
        }
        self.direct = [name for name in self.trained if "." not in name]

    @staticmethod
    def fits(method: SeparableMethod) -> bool:
        """Tell whether Opacus knows every layer that has parameters, as it is set, and none shares them."""
        layers = [
            layer
            for layer in method.modules()
            if layer is not method and any(value.requires_grad for value in layer.parameters(recurse=False))
        ]
        owned = [value for layer in layers for value in layer.parameters(recurse=False)]
        return (
            all(type(layer) in _KNOWN for layer in layers)
            and len({id(value) for value in owned}) == len(owned)
            and all(layer.padding_mode == "zeros" for layer in layers if isinstance(layer, nn.Conv2d))
        )

    def gradients(self, clip: float) -> Gradients:
        """Measure each patient's norm, weigh its loss, back-propagate once."""
        total, losses = self.zeros(), self.parameters[0].new_full((len(self.units),), torch.nan)
        for start in range(0, len(self.units), _CHUNK):
            chosen = list(range(start, min(start + _CHUNK, len(self.units))))
            while chosen:
                found, factors = self._add(chosen, clip, total)
                losses[chosen] = found
                if all(factors):
                    break
                # Zero times what overflowed would spoil the sum: once more without these patients.
                chosen = [place for place, factor in zip(chosen, factors, strict=True) if factor]
        return Gradients(total, losses)

    def _add(self, chosen: Sequence[int], clip: float, total: list[Tensor]) -> tuple[Tensor, list[float]]:
        """Add the patients' clipped gradients, unless one is not finite; give losses and clip factors."""
        views, there = stacked([self.units[place] for place in chosen])
        patients, images = there.shape
        seen: dict[str, _Seen] = {name: _Seen() for name in self.layers}
        hooks = [layer.register_forward_hook(_keep(seen[name])) for name, layer in self.layers.items()]
        try:
            points = self.method.embed([view.flatten(0, 1) for view in views])
        finally:
            for hook in hooks:
                hook.remove()
        heads = {
            name: self.trained[name].detach().expand(patients, *self.trained[name].shape).requires_grad_()
            for name in self.direct
        }
        losses = self._losses([point.unflatten(0, (patients, images)) for point in points], there, heads)
        outputs = [output for one in seen.values() for output in one.outputs]
        found = torch.autograd.grad(
            losses.sum(), [*outputs, *heads.values()], retain_graph=True, materialize_grads=True
        )
        squares = self._squares(seen, iter(found), patients, images)
        for part in found[len(outputs) :]:
            squares += part.double().flatten(1).square().sum(1)
        factors = [clip_factor((1.0 + _ROUNDING) * norm, clip) for norm in squares.sqrt().tolist()]
        if all(factors):
            self._back(losses, losses.new_tensor(factors), heads, total)
        return losses.detach(), factors

    def _losses(self, points: list[Tensor], there: Tensor, heads: dict[str, Tensor]) -> Tensor:
        """Loss of each patient, with own copies of the parameters that belong to no layer."""
        module = _PointsLoss(self.method)

        def loss(own: dict[str, Tensor], one: list[Tensor], mask: Tensor) -> Tensor:
            return functional_call(module, {f"method.{name}": value for name, value in own.items()}, (one, mask))

        return vmap(loss)(heads, points, there) if heads else vmap(lambda one, mask: loss({}, one, mask))(points, there)

    def _squares(self, seen: dict[str, _Seen], gradients: Any, patients: int, images: int) -> Tensor:  # noqa: ANN401
        """Squared norm of each patient's gradient over all layers."""
        from opacus.grad_sample import GradSampleModule

        total = torch.zeros(patients, dtype=torch.float64, device=self.parameters[0].device)
        for name, layer in self.layers.items():
            sampler = GradSampleModule.GRAD_SAMPLERS[_KNOWN[type(layer)]]
            sums: dict[nn.Parameter, Tensor] = {}
            for activation in seen[name].inputs:
                gradient = next(gradients).float()
                with torch.no_grad():
                    rows = sampler(layer, [activation.detach().float()], gradient)
                if len(activation) % (patients * images):  # rows that are no images: windows, tokens
                    raise RuntimeError("a layer's rows are no images")
                for parameter, row in rows.items():
                    # embed() joins views of one size, each with all patients' images
                    by_patient = row.reshape(-1, patients, images, *parameter.shape).sum((0, 2))
                    sums[parameter] = sums[parameter] + by_patient if parameter in sums else by_patient
            for value in sums.values():
                total += value.double().flatten(1).square().sum(1)
        return total

    def _back(self, losses: Tensor, factors: Tensor, heads: dict[str, Tensor], total: list[Tensor]) -> None:
        """Add the gradient of the weighted losses."""
        layered = {name: value for name, value in self.trained.items() if name not in heads}
        weighted = (factors * losses).sum()
        found = torch.autograd.grad(weighted, [*layered.values(), *heads.values()], materialize_grads=True)
        by_name = dict(zip([*layered, *heads], found, strict=True))
        for own, name in zip(total, self.trained, strict=True):
            own.add_(by_name[name].sum(0) if name in heads else by_name[name])


def _keep(seen: _Seen) -> Any:  # noqa: ANN401 - a hook
    def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if output.requires_grad:
            seen.inputs.append(inputs[0])
            seen.outputs.append(output)
        return output.clone()  # a ReLU in place would change what was kept

    return hook
