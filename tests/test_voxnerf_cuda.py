"""What can be known about CUDA without a GPU: the fused renderer's kernels compile for every architecture."""

import pytest
import warp as wp

from voxnerf.field import FIELDS
from voxnerf.fused import kernels
from voxnerf.fused.launch import start

ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)  # compute capabilities, times 10: from Turing to Blackwell

LATENTS = (4, 1, FIELDS["V_SD"].activation)  # channels, factors of a direction, activation


def compiled(made, arch, folder):
    """The sizes in bytes of the programs that kernels compile to."""
    start()
    for kernel in made:
        wp.compile_aot_module(kernel.module, device=None, arch=arch, module_dir=str(folder))
    return [path.stat().st_size for path in folder.glob(f"*.sm{arch}.cubin")]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_kernels_compile_for_every_architecture(arch, tmp_path):
    """Those of a field of latents, its exact gradient, the flags, the sums over grids, and the optimizers."""
    made = [
        kernels.march_kernel(*LATENTS, False, kernels.LANES["cuda"]),
        kernels.march_backward_kernel(*LATENTS, kernels.LANES["cuda"]),
        kernels.march_backward_kernel(*LATENTS, kernels.LANES["cuda"], exact=True),
        kernels.sweep_kernel(kernels.move),
        kernels.sweep_kernel(kernels.dot),
        kernels.adam_kernel(4),
        kernels.adamax_kernel(),
        kernels.fill_kernel(),
        kernels.spread_kernel(),
    ]
    sizes = compiled(made, arch, tmp_path)
    assert len(sizes) == len(made) and min(sizes) > 1000


@pytest.mark.parametrize("kind, channels, n_basis", [("V_SD", 4, 1), ("V_SJC", 3, 1), ("VoxRF", 3, 1), ("VoxRF", 3, 9)])
def test_kernels_of_every_field_compile(kind, channels, n_basis, tmp_path):
    """With a mask and without, the sums of floats and the exact ones."""
    of_kind, lanes = (channels, n_basis, FIELDS[kind].activation), kernels.LANES["cuda"]
    made = [kernels.march_kernel(*of_kind, masked, lanes) for masked in (False, True)]
    made += [kernels.march_backward_kernel(*of_kind, lanes, exact) for exact in (False, True)]
    assert len(compiled(made, 90, tmp_path)) == len(made)
