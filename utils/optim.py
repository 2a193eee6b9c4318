"""What trains networks as small as these faster than PyTorch does by default."""

import torch


def fast_products(width):
    """Let oneDNN multiply float32 matrices, on AMD's Zen 5 twice as fast as MKL, if layers are wide; else MKL is faster.

    oneDNN takes over where bfloat16 may stand for float32. It rounds to bfloat16 on processors with AMX only; where a trial
    product comes out rounded, MKL stays."""
    matmul = torch.backends.mkldnn.matmul
    matmul.fp32_precision = "bf16" if width >= 128 else "none"
    x = torch.full((256, 256), 1 + 2**-12)  # has more digits than bfloat16
    if not torch.equal(x @ torch.eye(256), x):
        matmul.fp32_precision = "none"


class Adam(torch.optim.Optimizer):
    """torch.optim.Adam(fused=True), to the bit, without most of its options and of the time it spends in Python. arXiv:1412.6980.
    A group has one count of steps."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    def add_param_group(self, group):  # the base class adds its first groups so, too
        super().add_param_group(group)
        group, params = self.param_groups[-1], self.param_groups[-1]["params"]
        group["means"], group["squares"] = ([torch.zeros_like(p) for p in params] for _ in range(2))
        group["steps"] = [p.new_zeros(()) for p in params[:1]] * len(params)  # one tensor, many times

    def zero_grad(self):  # that of the base class is wrapped for the profiler, too
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            rows = zip(group["params"], group["means"], group["squares"], group["steps"], strict=True)
            rows = [(p, p.grad, *state) for p, *state in rows if p.grad is not None]
            if rows:
                params, grads, means, squares, steps = zip(*rows, strict=True)
                # an older checkpoint's group may lack one
                options = {name: group.get(name, self.defaults[name]) for name in ("lr", "eps", "weight_decay")}
                options |= dict(zip(("beta1", "beta2"), group["betas"], strict=True), amsgrad=False, maximize=False)
                steps[0].add_(1)
                torch._fused_adam_(params, grads, means, squares, [], steps, **options)

    step.hooked = True  # else torch.optim.Optimizer wraps it for the profiler, which takes nearly as long as the step itself
