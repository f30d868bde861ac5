"""A reference that moves (TR-DPO, Gorbatovski et al. 2024, arXiv 2404.09656, section 3), kept as one more LoRA adapter.

Soft update: theta_ref <- share * theta_policy + (1 - share) * theta_ref. Hard update: theta_ref <- theta_policy.

Policy and reference share the base's weights, so only the products scale * B A are interpolated. Interpolating the
factors would give another model: (B + B')(A + A') has cross terms. A sum of products is a product of stacks,
[B B'] [A; A'], an adapter whose rank is the sum of the ranks. The rank grows with every soft update, until it is
truncated (SVD).

Shapes: O, I = outputs and inputs of a linear layer, R = rank, K = the smaller of rank and width.
"""

from __future__ import annotations

from copy import copy

import torch
from peft import LoraConfig, PeftModel
from peft.tuners import lora
from torch import Tensor, nn

from dpo_studio.errors import ModelError
from dpo_studio.models.adapters import POLICY, REFERENCE
from dpo_studio.models.experts import adapts_experts

__all__ = [
    "RANKS_KEPT",
    "check_movable",
    "check_movable_settings",
    "move_reference",
    "put_reference",
    "reference_state",
]

RANKS_KEPT = 4
"""The reference's rank, at most, in ranks of the policy's adapter. In training successive policies share most of their
directions: on SmolLM2-135M 4 truncate 7e-6, less than bf16 rounds; of twelve unrelated policies it would be 2 %."""


def check_movable(policy: PeftModel) -> None:
    """Raises ModelError if an adapter is more than products: magnitudes, experts and whole modules have no such sum."""
    if adapts_experts(policy):
        raise _unmovable("adapted experts", "name layers of attention as adapter.targets")
    for config in policy.peft_config.values():
        check_movable_settings(config)


def check_movable_settings(config: LoraConfig) -> None:
    """The same of an adapter's settings, before there is a model."""
    if config.use_dora or config.modules_to_save:
        what = "a DoRA adapter" if config.use_dora else "an adapter with whole modules"
        raise _unmovable(what, "use adapter.kind: lora or rslora without modules_to_save")


def _unmovable(what: str, way_on: str) -> ModelError:
    return ModelError(
        f"reference.update_every: {what} cannot be mixed into a reference that moves (TR-DPO)",
        hint=f"{way_on}, or use a reference that does not move",
    )


@torch.no_grad()
def move_reference(policy: PeftModel, share: float) -> float:
    """Interpolate: `share` of the policy's weights, the rest of the reference's own.

    Returns the relative truncation error of the worst layer, in Frobenius norms. Such errors decay with the old
    reference, a geometric series: their sum is at most the worst cut / share.
    """
    configs = policy.peft_config.values()
    most = RANKS_KEPT * max(rank for config in configs for rank in (config.r, *config.rank_pattern.values()))
    worst = 0.0
    for layer in _layers(policy).values():
        A_RI, B_OR = _interpolated(layer, share)
        if len(A_RI) > most:
            A_RI, B_OR, cut = _truncated(A_RI, B_OR, most)
            worst = max(worst, cut)
        _set_reference(layer, A_RI, B_OR)
    _make_known(policy)
    return worst


def reference_state(policy: PeftModel) -> dict[str, Tensor]:
    """The reference adapter's tensors by name, on the CPU; none while the reference is the base itself."""
    named = sorted(policy.named_parameters())
    return {name: p.detach().cpu().contiguous() for name, p in named if name.endswith(f".{REFERENCE}.weight")}


def put_reference(policy: PeftModel, tensors: dict[str, Tensor]) -> None:
    """Restore the reference that `reference_state` returned."""
    for name, layer in _layers(policy).items():
        A_RI, B_OR = (tensors.get(f"{name}.{factor}.{REFERENCE}.weight") for factor in ("lora_A", "lora_B"))
        if A_RI is not None and B_OR is not None:
            device = next(iter(layer.lora_A.values())).weight.device
            _set_reference(layer, A_RI.to(device), B_OR.to(device))
    _make_known(policy)


def _layers(policy: PeftModel) -> dict[str, lora.LoraLayer]:
    return {name: module for name, module in policy.named_modules() if isinstance(module, lora.LoraLayer)}


def _interpolated(layer: lora.LoraLayer, share: float) -> tuple[Tensor, Tensor]:
    """The stacks whose product is the interpolated one. B's columns include the weights: one scale serves all."""
    there = [name for name in (POLICY, REFERENCE) if name in layer.lora_A]
    if share == 1:
        there = there[:1]  # a copy of the policy, to the bit
    weights = {POLICY: share, REFERENCE: 1 - share}
    A_RI = torch.cat([layer.lora_A[name].weight for name in there])
    columns = [weights[name] * (layer.scaling[name] / _scale(layer)) * layer.lora_B[name].weight for name in there]
    return A_RI, torch.cat(columns, 1)


def _truncated(A_RI: Tensor, B_OR: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The product of `rank` nearest to B A (Eckart and Young 1936), and how far it is, relative to B A.

    With B = Q r and A^T = Q' r', the singular values of the small r r'^T are those of B A. All 210 layers of
    SmolLM2-135M, rank 80 to 64, take 1.5 s on one core.
    """
    Q_OK, r_KR = torch.linalg.qr(B_OR.double())
    Q_IK, r_KR_ = torch.linalg.qr(A_RI.T.double())
    U_KK, sizes_K, V_KK = torch.linalg.svd(r_KR @ r_KR_.T, full_matrices=False)
    root_R = sizes_K[:rank].sqrt()
    B = Q_OK @ (U_KK[:, :rank] * root_R)
    A = (root_R[:, None] * V_KK[:rank]) @ Q_IK.T
    cut = sizes_K[rank:].norm() / sizes_K.norm().clamp_min(torch.finfo(torch.double).tiny)
    return A.to(A_RI.dtype), B.to(B_OR.dtype), cut.item()


def _set_reference(layer: lora.LoraLayer, A_RI: Tensor, B_OR: Tensor) -> None:
    """Replace a layer's reference adapter by one of any rank."""
    layer.scaling[REFERENCE] = _scale(layer)
    layer.r[REFERENCE] = len(A_RI)
    layer.lora_dropout[REFERENCE] = nn.Identity().eval()
    layer.lora_A[REFERENCE], layer.lora_B[REFERENCE] = _frozen(A_RI), _frozen(B_OR)


def _scale(layer: lora.LoraLayer) -> float:
    """The scale of a moved reference: the policy's, so that a copy of the policy rounds as the policy does."""
    return float(layer.scaling[POLICY if POLICY in layer.lora_A else REFERENCE])


def _frozen(weight_OI: Tensor) -> nn.Linear:
    linear = nn.Linear(weight_OI.shape[1], weight_OI.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight_OI.contiguous(), requires_grad=False)
    return linear.eval()


def _make_known(policy: PeftModel) -> None:
    """Register the reference adapter with PEFT, unless PEFT has loaded one."""
    if REFERENCE not in policy.peft_config:
        config = copy(policy.peft_config[POLICY])
        config.inference_mode = True
        policy.peft_config[REFERENCE] = config
