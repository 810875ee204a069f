"""Adam that leaves alone the voxels that no ray can reach: exact elsewhere, and many times faster on sparse fields."""

import torch

from voxnerf import fused, kernels


class OccupiedAdam(torch.optim.Adam):
    """Adam (arXiv 1412.6980, Algorithm 1) of a `VoxRF`, on grids only where its mask lets rays see them.

    There every step is that of `torch.optim.Adam`, whose state it keeps; elsewhere gradients are 0, and
    values and moments stay. Without a mask it is `torch.optim.Adam`. Each parameter is a group of its own.
    """

    def __init__(self, field, lr, betas, eps=1e-8):
        super().__init__([{"params": [p]} for p in field.parameters()], lr, betas, eps)
        self.field = field

    @torch.no_grad()
    def step(self, closure=None):
        """Take one step with the gradients at hand."""
        if self.field.alpha_mask is None:
            return super().step(closure)
        for group in self.param_groups:
            (p,) = group["params"]
            state = self.state[p]
            if not state:
                state.update(step=torch.tensor(0.0), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
            state["step"] += 1
            beta1, beta2 = group["betas"]
            step = state["step"].item()  # on the CPU
            rates = [beta1, beta2, group["lr"] / (1 - beta1**step), (1 - beta2**step) ** 0.5, group["eps"]]
            if p.ndim == 5:
                self._step_grid([p, p.grad, state["exp_avg"], state["exp_avg_sq"]], rates)
            else:
                step_all(p, p.grad, state["exp_avg"], state["exp_avg_sq"], *rates)
        return None

    def _step_grid(self, tensors, rates):
        channels = tensors[0].shape[1]
        kernel, dtype = kernels.adam_kernel(channels), kernels.vector(channels)
        rows = [fused.rows_of(x) for x in tensors]
        if any(row.data_ptr() != x.data_ptr() for row, x in zip(rows, tensors)):
            raise ValueError("OccupiedAdam needs grids, gradients and moments stored channels-last")
        _, blocks = fused.mask_flags(self.field.alpha_mask)
        arguments = [fused.volume_of(self.field), fused.array(blocks), *rates]
        fused.launch(
            kernel,
            fused.interleaved(len(blocks), blocks.device),
            [*arguments, *(fused.array(row, dtype) for row in rows)],
            blocks.device,
        )


def step_all(p, g, m, v, beta1, beta2, rate, root, eps):
    """Update parameter p and moments m, v in place: `rate` is lr / (1 - beta1^t), `root` is sqrt(1 - beta2^t)."""
    m.lerp_(g, 1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    p.addcdiv_(m, v.sqrt() / root + eps, value=-rate)
