"""WUDI-Merging: the update with the least interference, by 300 gradient steps or in closed form.

Legend: B layers of equal shape, K experts, O output rows, I input columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from bd_core.methods.matrices import LAYER_BYTES, PROJECTIONS, add_gram, by_layers, expert_layers, kept, right_solve
from bd_core.methods.stream import EMBEDDINGS, Merged, StateDict, matrix_names

__all__ = ["OUTSIDE_BLOCKS", "wudi", "wudi_exact"]

# The released code merges the matrices of attention and MLP only; here by what they are not, so that any naming works.
OUTSIDE_BLOCKS = (*EMBEDDINGS, *PROJECTIONS)
BETAS, ADAM_EPSILON = (0.9, 0.999), 1e-8  # Adam's own defaults, which the released code keeps


def wudi(
    base: StateDict,
    experts: Sequence[StateDict],
    *,
    steps: int = 300,
    learning_rate: float = 1e-5,
    exclude: Sequence[str] = OUTSIDE_BLOCKS,
    budget_bytes: int = LAYER_BYTES,
) -> Merged:
    """theta_0 + tau per matrix, tau lowering sum_k |(tau - tau_k) tau_k^T|^2 / |tau_k|^2 from sum_k tau_k by Adam.

    The loss needs tau_k only through C_k = tau_k^T tau_k: its gradient is 2 (tau A - P) with A = sum_k C_k / |tau_k|^2
    and P = sum_k tau_k C_k / |tau_k|^2, so a step is one product, however many experts. Everything but the matrices
    of attention and MLP (named by `exclude`: embeddings, projections to the joint space, heads) stays at theta_0.

    Source: Cheng et al., Whoever Started the Interference Should End It, ICML 2025: Adam 1e-5, 300 steps. The steps
    are early stopping, not a solution (`wudi_exact`). FusionBench also merges every other matrix this way
    (`exclude=()`), and gives the mean of the experts to what is no matrix. Zero task vectors have no say.
    Cost: `steps` products [O, I] [I, I] a matrix; A and six buffers of the layers' size, however many experts.
    """
    if steps < 1:
        raise ValueError(f"wudi: steps={steps} must be at least 1")
    if not learning_rate > 0:
        raise ValueError(f"wudi: learning_rate={learning_rate} must be above 0")

    def descended(names: list[str]) -> Tensor:
        gram_BII, product_BOI, start_BOI = _statistics(base, experts, names)
        mean_BOI, square_BOI = torch.zeros_like(start_BOI), torch.zeros_like(start_BOI)
        for t in range(1, steps + 1):
            # The factor 2 of the gradient stays: Adam's epsilon is absolute, so the scale of the gradient counts.
            gradient_BOI = torch.baddbmm(product_BOI, start_BOI, gram_BII, beta=-2, alpha=2)
            mean_BOI.lerp_(gradient_BOI, 1 - BETAS[0])
            square_BOI.mul_(BETAS[1]).addcmul_(gradient_BOI, gradient_BOI, value=1 - BETAS[1])
            root_BOI = square_BOI.sqrt().div_((1 - BETAS[1] ** t) ** 0.5).add_(ADAM_EPSILON)
            start_BOI.addcdiv_(mean_BOI, root_BOI, value=-learning_rate / (1 - BETAS[0] ** t))
        return start_BOI

    return by_layers(base, experts, matrix_names(base, exclude), budget_bytes, descended, rest=kept)


def wudi_exact(
    base: StateDict,
    experts: Sequence[StateDict],
    *,
    damping: float = 1e-6,
    exclude: Sequence[str] = OUTSIDE_BLOCKS,
    budget_bytes: int = LAYER_BYTES,
) -> Merged:
    """theta_0 + P (A + damping * mean(eigenvalues of A) I)^-1 per matrix: the minimum of WUDI's loss in closed form.

    A, P and the layers as in `wudi`. The trace of A is the number of task vectors that are not zero, so the added
    ridge is `damping` times that number over I: it bounds what rounding can become in input directions that no task
    vector uses, and leaves the minimum elsewhere (ours; 0 takes the pseudo-inverse where A is singular).

    Source: the normal equations of Cheng et al.'s loss, which is quadratic. Its loss is far below that of the 300
    steps; which of the two predicts better is a matter of the experts.
    Cost: one Gram matrix of the stacked task vectors and one Cholesky solve in float64 a matrix: 15 to 270 times
    less than the steps; A in float32 and float64 and four buffers of the layers' size, however many experts.
    """
    if not 0 <= damping < 1:
        raise ValueError(f"wudi_exact: damping={damping} must lie in [0, 1)")

    def steps(names: list[str]) -> Tensor:
        n_rows, n_columns = base[names[0]].shape
        if len(experts) * n_rows < n_columns:  # A is singular
            return _few_rows(base, experts, names, damping)
        gram_BII, product_BOI, _ = _statistics(base, experts, names)
        return right_solve(product_BOI, gram_BII, damping * gram_BII.diagonal(dim1=1, dim2=2).mean(1))

    return by_layers(base, experts, matrix_names(base, exclude), budget_bytes, steps, rest=kept)


def _few_rows(
    base: StateDict, experts: Sequence[StateDict], names: Sequence[str], damping: float
) -> Float[Tensor, "B O I"]:
    """P (A + ridge I)^-1 where all task vectors together have fewer rows S than columns: A = S^T S, P = L S, so it is
    L (S S^T + ridge I)^-1 S, and what is solved is regular."""
    units, weights = [], []
    for vectors_BOI in expert_layers(base, experts, names):
        norm_B11, unit_BOI = _unit(vectors_BOI)
        units.append(unit_BOI.clone())
        weights.append(norm_B11 * (unit_BOI @ unit_BOI.mT))
    stacked_BNI, left_BON = torch.cat(units, 1), torch.cat(weights, 2)
    inner_BNN = stacked_BNI @ stacked_BNI.mT
    ridge_B = damping * inner_BNN.diagonal(dim1=1, dim2=2).sum(1) / stacked_BNI.shape[2]
    return right_solve(left_BON, inner_BNN, ridge_B) @ stacked_BNI


def _statistics(
    base: StateDict, experts: Sequence[StateDict], names: Sequence[str]
) -> tuple[Float[Tensor, "B I I"], Float[Tensor, "B O I"], Float[Tensor, "B O I"]]:
    """A, P and sum_k tau_k of these layers."""
    gram_BII = product_BOI = total_BOI = torch.empty(0)
    for k, vectors_BOI in enumerate(expert_layers(base, experts, names)):
        if k == 0:
            gram_BII = vectors_BOI.new_zeros((len(names), *(vectors_BOI.shape[2:] * 2)))
            product_BOI, total_BOI = torch.zeros_like(vectors_BOI), torch.zeros_like(vectors_BOI)
        total_BOI += vectors_BOI
        norm_B11, unit_BOI = _unit(vectors_BOI)
        add_gram(gram_BII, product_BOI, unit_BOI * norm_B11, unit_BOI)
    return gram_BII, product_BOI, total_BOI


def _unit(vectors_BOI: Tensor) -> tuple[Float[Tensor, "B 1 1"], Float[Tensor, "B O I"]]:
    """Norms, and the task vectors brought to norm 1 in place; zero ones stay."""
    norm_B11 = torch.linalg.vector_norm(vectors_BOI, dim=(1, 2), keepdim=True)
    return norm_B11, vectors_BOI.div_(torch.where(norm_B11 > 0, norm_B11, 1.0))
