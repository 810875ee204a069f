"""What can be known about CUDA without a GPU: the fused renderer's kernels compile for every architecture."""

import pytest
import warp as wp

from voxnerf.field import FIELDS
from voxnerf.fused import kernels
from voxnerf.fused.launch import start

ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)  # compute capabilities, times 10: from Turing to Blackwell


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
        *kernels.march_kernels(4, 1, FIELDS["V_SD"].activation, False, kernels.LANES["cuda"]),
        kernels.sweep_kernel(kernels.move),
        kernels.sweep_kernel(kernels.dot),
        kernels.adam_kernel(4),
        kernels.adamax_kernel(),
        *kernels.flag_kernels(),
        kernels.march_kernels(4, 1, FIELDS["V_SD"].activation, False, kernels.LANES["cuda"], exact=True)[1],
    ]
    sizes = compiled(made, arch, tmp_path)
    assert len(sizes) == len(made) and min(sizes) > 1000


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind, channels, n_basis", [("V_SD", 4, 1), ("V_SJC", 3, 1), ("VoxRF", 3, 1), ("VoxRF", 3, 9)])
def test_kernels_of_every_field_compile(kind, channels, n_basis, masked, tmp_path):
    made = kernels.march_kernels(channels, n_basis, FIELDS[kind].activation, masked, kernels.LANES["cuda"])
    assert len(compiled(made, 90, tmp_path)) == len(made)
