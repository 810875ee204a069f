"""The fused ray march as Warp kernels: one Python source for CPU and CUDA.

`march` walks each ray once: it jumps over blocks of cells without density, reads the density
trilinearly, composites, and reads the colour only where it shows. It lists the stretches of samples
that mattered. `march_backward` walks that list from the far end and applies, by hand, the chain rule to

    out = sum_i w_i h_i,   w_i = T_i alpha_i,   alpha_i = 1 - exp(-tau_i),   T_i = exp(-sum_{j<i} tau_j),

    d out / d tau_i = h_i T_{i+1} - sum_{j>i} w_j h_j,

h_i being what a sample adds per unit of weight. `voxnerf/reference.py` is the same in plain PyTorch.
Most loops over the samples of a stretch are so simple that a compiler turns them into vector instructions, and the
other loops are kept apart from them. Colours are prefetched before the weights are computed, since a CPU cannot predict
which ones a ray needs. The kernels are long because Warp copies the matrices of a stretch for each function that gets
them, which made the march take 40% longer.

Positions are in voxels: 0 is the centre of the first one, x fastest in memory. A cell is the cube
between eight centres; cell c spans the voxels c - 1 and c, so that the border cells 0 and size,
half of which lie outside the grid, are counted too. Grids are zero outside.
"""

# mypy: ignore-errors
# Kernels are written in the language of Warp, in which annotations are types of C.

import functools
import math
from typing import Any

import warp as wp

BLOCK = 4  # cells per edge of a block, which is skipped as a whole
TAU_MIN = 1e-9  # thinner samples are skipped: n of them change nothing by more than n * TAU_MIN
T_MIN = 1e-7  # transmittance at which a ray ends

FILLED, EMPTY = 0, 1  # flags of blocks; in empty space a flag is the distance, in blocks, to the nearest filled one
MAX_JUMP = 4  # the largest flag
EDGE = 0.49  # less than the weight, 1/2, that the outermost voxel of an axis still has at the face of the box
LANES = {"cpu": 16, "cuda": 1}  # samples per stretch: as many floats as a CPU's widest register holds
STRIDED = {"cpu": False, "cuda": True}  # whether the visits of a ray lie apart: then neighbouring rays write together
OPTIONS = {
    # sums may be reordered, and the sign of 0 may be lost: otherwise no loop becomes vector instructions
    "cpu_compiler_flags": f"{wp.config.cpu_compiler_flags} -ffp-contract=fast -mreassociate -fno-signed-zeros",
    "max_unroll": 8,  # corners and rows of blocks are unrolled, lanes are not
}


@wp.struct
class Volume:
    """What a march needs of a field besides its grids."""

    size: wp.vec3i  # voxels X, Y, Z
    blocks: wp.vec3i  # blocks X, Y, Z
    step: float  # between samples, world units
    shift: float  # of the density before its softplus
    x_min: float  # softplus(x) step < TAU_MIN below it
    threshold: float  # samples whose weight is not above it have no colour


# Plain addressing: that of Warp's arrays wraps negative indices and multiplies strides, which in these
# loops costs as much as the arithmetic.


@wp.func_native("return grid.data[i];")
def load(grid: wp.array(dtype=float), i: int) -> float: ...


@wp.func_native("return grid.data[i];")
def load_flag(grid: wp.array(dtype=wp.uint8), i: int) -> wp.uint8: ...


@wp.func_native("wp::atomic_add(grid.data + i, value);")
def add(grid: wp.array(dtype=float), i: int, value: float, unit: float): ...


@wp.func_native("wp::atomic_add(grid.data + i, wp::int64(wp::floor(wp::float64(value) * unit + 0.5)));")
def add_exact(grid: wp.array(dtype=wp.int64), i: int, value: float, unit: float): ...


@wp.func
def exp_negative(x: float):
    """exp(x) for x <= 0, to 2e-7 relative, inline: a call of the C library would cost more than all else here."""
    y = wp.max(x, -80.0) * 1.4426950408889634
    n = wp.floor(y + 0.5)
    r = (y - n) * 0.6931471805599453
    s = 1.0 + r * (1.0 + r * (1.0 / 2.0 + r * (1.0 / 6.0 + r * (1.0 / 24.0 + r * (1.0 / 120.0 + r * (1.0 / 720.0))))))
    return s * wp.cast((int(n) + 127) << 23, wp.float32)


@wp.func
def log1p(y: float):
    """log(1 + y) for y >= 0, to 2e-7 relative: with 1 + y = 2^n (1 + f), n log 2 + 2 atanh(f / (2 + f))."""
    n = (wp.cast(1.0 + y, wp.int32) >> 23) - 127
    scale = wp.cast((127 - n) << 23, wp.float32)
    f = y * scale + (scale - 1.0)
    s = f / (2.0 + f)
    q = s * s
    return float(n) * 0.6931471805599453 + 2.0 * s * (
        1.0
        + q
        * (
            1.0 / 3.0
            + q
            * (1.0 / 5.0 + q * (1.0 / 7.0 + q * (1.0 / 9.0 + q * (1.0 / 11.0 + q * (1.0 / 13.0 + q * (1.0 / 15.0))))))
        )
    )


@wp.func
def one_minus_exp(x: float):  # 1 - exp(-x) for x >= 0
    series = x * (1.0 - x * (1.0 / 2.0 - x * (1.0 / 6.0 - x * (1.0 / 24.0 - x * (1.0 / 120.0)))))
    return wp.where(x > 0.1, 1.0 - exp_negative(-x), series)


@wp.func
def softplus(x: float):
    return wp.where(x < 0.0, 0.0, x) + log1p(exp_negative(-wp.abs(x)))


@wp.func
def sigmoid(x: float):
    e = exp_negative(-wp.abs(x))
    s = e / (1.0 + e)
    if x > 0.0:
        s = 1.0 - s
    return s


@wp.func
def sides(x: float, size: int):
    """Numbers of the voxels before and after x along an axis, and their weights, 0 outside the grid."""
    before = wp.floor(x)
    i = int(before)
    share = x - before
    return (
        wp.clamp(i, 0, size - 1),
        wp.clamp(i + 1, 0, size - 1),
        wp.where(i < 0, 0.0, 1.0 - share),
        wp.where(i > size - 2, 0.0, share),
    )


@wp.func
def cell_of(p: wp.vec3):
    return wp.vec3i(int(wp.floor(p[0])) + 1, int(wp.floor(p[1])) + 1, int(wp.floor(p[2])) + 1)


@wp.func
def seen(cells: wp.array(dtype=wp.uint8), p: wp.vec3, size: wp.vec3i):
    """Whether a mask's flags of cells let rays see the sample at p."""
    cell = cell_of(p)
    x = wp.clamp(cell[0], 0, size[0])  # what lies outside is not counted anyway
    y = wp.clamp(cell[1], 0, size[1])
    z = wp.clamp(cell[2], 0, size[2])
    return load_flag(cells, (z * (size[1] + 1) + y) * (size[0] + 1) + x) != wp.uint8(0)


@wp.func
def leave_axis(o: float, d_inverse: float, block: int, jump: int):
    """Distance beyond the first sample at which a ray leaves, along an axis, all blocks nearer than `jump` to one."""
    return (float(wp.where(d_inverse > 0.0, block + jump, block - jump + 1) * BLOCK - 1) - o) * d_inverse


@wp.func
def leave(o: wp.vec3, d_inverse: wp.vec3, block: wp.vec3i, jump: int):
    return wp.min(
        leave_axis(o[0], d_inverse[0], block[0], jump),
        wp.min(leave_axis(o[1], d_inverse[1], block[1], jump), leave_axis(o[2], d_inverse[2], block[2], jump)),
    )


@wp.func
def inverse(d: float):  # 1 / d, but finite, so that 0 times it is 0
    if wp.abs(d) < 1.0e-20:
        return 1.0e20
    return 1.0 / d


@wp.func
def block_number(block: wp.vec3i, blocks: wp.vec3i):
    return (block[2] * blocks[1] + block[1]) * blocks[0] + block[0]


@wp.func
def block_of(p: wp.vec3):
    cell = cell_of(p)
    return wp.vec3i(cell[0] // BLOCK, cell[1] // BLOCK, cell[2] // BLOCK)


@wp.func
def block_at(b: int, blocks: wp.vec3i):
    return wp.vec3i(b % blocks[0], (b // blocks[0]) % blocks[1], b // (blocks[0] * blocks[1]))


@wp.func
def voxels_reached(flags: wp.array(dtype=wp.uint8), block: wp.vec3i, blocks: wp.vec3i):
    """Whether the BLOCK^3 voxels with a block's numbers are reached from a filled block: from it or from the next."""
    for dz in range(2):
        for dy in range(2):
            for dx in range(2):
                near = wp.vec3i(
                    wp.min(block[0] + dx, blocks[0] - 1),
                    wp.min(block[1] + dy, blocks[1] - 1),
                    wp.min(block[2] + dz, blocks[2] - 1),
                )
                if load_flag(flags, block_number(near, blocks)) == wp.uint8(FILLED):
                    return True
    return False


PREFETCH = "\n#if !defined(__CUDA_ARCH__)\n__builtin_prefetch(grid.data + i);\n#endif\n"


@functools.cache
def vector(length: int) -> Any:
    """Return the type of `length` floats, the same one for the same length."""
    return wp.types.vector(length=length, dtype=wp.float32)


@functools.cache
def place_function(lanes: int) -> wp.Function:
    """Return the function that places stretches of `lanes` samples."""
    index_type = wp.types.matrix(shape=(8, lanes), dtype=wp.int32)
    weight_type = wp.types.matrix(shape=(8, lanes), dtype=wp.float32)
    L = wp.constant(lanes)

    @wp.func
    def place(o: wp.vec3, d: wp.vec3, step: float, i: int, size: wp.vec3i):
        """Numbers of the 8 voxels around each sample of the stretch from sample i, and their trilinear weights."""
        index = index_type()
        weight = weight_type()
        for k in range(L):
            s = float(i + k) * step
            x0, x1, u0, u1 = sides(o[0] + s * d[0], size[0])
            y0, y1, v0, v1 = sides(o[1] + s * d[1], size[1])
            z0, z1, w0, w1 = sides(o[2] + s * d[2], size[2])
            for c in range(8):
                row = wp.where(c // 4 == 0, z0, z1) * size[1] + wp.where(c // 2 % 2 == 0, y0, y1)
                index[c, k] = row * size[0] + wp.where(c % 2 == 0, x0, x1)
                weight[c, k] = (
                    wp.where(c // 4 == 0, w0, w1) * wp.where(c // 2 % 2 == 0, v0, v1) * (wp.where(c % 2 == 0, u0, u1))
                )
        return index, weight

    return place


@functools.cache
def row_functions(n_features: int) -> tuple[wp.Function, ...]:
    """Return (load, add, add_exact, prefetch, prefetch_exact) for rows of `n_features` values.

    See `load`, `add` and `add_exact` of single ones.
    """
    features = vector(n_features)

    @wp.func_native("return grid.data[i];")
    def load_features(grid: wp.array(dtype=features), i: int) -> features: ...

    @wp.func_native("wp::atomic_add(grid.data + i, value);")
    def add_features(grid: wp.array(dtype=features), i: int, value: features, unit: float): ...

    @wp.func
    def add_features_exact(grid: wp.array(dtype=wp.int64), i: int, value: features, unit: float):
        for c in range(wp.static(n_features)):
            add_exact(grid, i * wp.static(n_features) + c, value[c], unit)

    @wp.func_native(PREFETCH)
    def prefetch_features(grid: wp.array(dtype=features), i: int): ...

    @wp.func_native(PREFETCH)
    def prefetch_exact(grid: wp.array(dtype=wp.int64), i: int): ...

    return load_features, add_features, add_features_exact, prefetch_features, prefetch_exact


@functools.cache
def color_functions(channels: int, n_basis: int, activation: str) -> tuple[wp.Function, ...]:
    """Return (look, look_back, to_color, to_color_backward): from features to the colour a ray sees, and back.

    A colour has `channels` channels, each the `activation` (see `voxnerf.field`) of a dot product of `n_basis` features
    with the ray's basis.
    """
    features, colors = vector(channels * n_basis), vector(channels)
    C, B = wp.constant(channels), wp.constant(n_basis)

    @wp.func
    def look(f: features, basis: wp.array2d(dtype=float), r: int):
        """Features of all directions to those that ray r sees."""
        seen = colors()
        for c in range(C):
            if wp.static(n_basis == 1):
                seen[c] = f[c]
            else:
                s = float(0.0)
                for b in range(B):
                    s += basis[r, b] * f[c * B + b]
                seen[c] = s
        return seen

    @wp.func
    def look_back(g: colors, basis: wp.array2d(dtype=float), r: int):
        """Gradient of the features from that of those that ray r sees."""
        spread = features()
        for c in range(C):
            if wp.static(n_basis == 1):
                spread[c] = g[c]
            else:
                for b in range(B):
                    spread[c * B + b] = basis[r, b] * g[c]
        return spread

    @wp.func
    def to_color(f: colors):
        out = colors()
        for c in range(C):
            if wp.static(activation == "raw"):
                out[c] = f[c]
            elif wp.static(activation == "sigmoid"):
                out[c] = sigmoid(f[c])
            else:
                out[c] = 2.0 * sigmoid(f[c]) - 1.0
        return out

    @wp.func
    def to_color_backward(color: colors, g: colors):
        out = colors()
        for c in range(C):
            if wp.static(activation == "raw"):
                out[c] = g[c]
            elif wp.static(activation == "sigmoid"):
                out[c] = g[c] * color[c] * (1.0 - color[c])
            else:
                out[c] = g[c] * 0.5 * (1.0 - color[c] * color[c])
        return out

    return look, look_back, to_color, to_color_backward


@functools.cache
def march_kernel(channels: int, n_basis: int, activation: str, masked: bool, lanes: int) -> wp.Kernel:
    """Return the kernel that marches through one kind of field, in stretches of `lanes` samples.

    With `masked` it reads flags of cells besides flags of blocks.
    """
    floats, L, place = vector(lanes), wp.constant(lanes), place_function(lanes)
    features, colors = vector(channels * n_basis), vector(channels)
    load_features, _, _, prefetch_features, _ = row_functions(channels * n_basis)
    look, _, to_color, _ = color_functions(channels, n_basis, activation)

    @wp.kernel(enable_backward=False, module="unique", module_options=OPTIONS)
    def march(
        first: int,
        stride: int,
        rays_o: wp.array(dtype=wp.vec3),
        rays_d: wp.array(dtype=wp.vec3),
        rays_t_min: wp.array(dtype=float),
        n_samples: wp.array(dtype=int),
        volume: Volume,
        d_scale: wp.array(dtype=float),
        density: wp.array(dtype=float),
        color: wp.array(dtype=features),
        basis: wp.array2d(dtype=float),
        blocks: wp.array(dtype=wp.uint8),
        cells: wp.array(dtype=wp.uint8),
        emptiness_scale: float,
        keep: int,
        entry_stride: int,
        ray_stride: int,
        n_visits: wp.array(dtype=int),
        visit_sample: wp.array(dtype=int),
        visit_T: wp.array(dtype=float),
        visit_tau: wp.array(dtype=float),
        out_color: wp.array(dtype=colors),
        out_depth: wp.array(dtype=float),
        out_opacity: wp.array(dtype=float),
        out_emptiness: wp.array(dtype=float),
    ):
        r = first + wp.tid() * stride
        o = rays_o[r]
        d = rays_d[r]
        scale = wp.exp(d_scale[0])
        d_inverse = wp.vec3(inverse(d[0]), inverse(d[1]), inverse(d[2]))
        step_inverse = 1.0 / volume.step
        t_min = rays_t_min[r]
        n = n_samples[r]
        light = colors()
        depth = float(0.0)
        opacity = float(0.0)
        emptiness = float(0.0)
        T = float(1.0)
        m = int(0)
        i = int(0)
        while i < n:
            p = o + float(i) * volume.step * d
            block = block_of(p)
            jump = int(load_flag(blocks, block_number(block, volume.blocks)))
            if jump > 0:
                out = leave(o, d_inverse, block, jump)
                i = wp.max(i + 1, int(wp.ceil(out * step_inverse)))
                continue
            index, weight = place(o, d, volume.step, i, volume.size)
            tau = floats()
            for k in range(L):
                x = volume.shift
                for c in range(8):
                    x += scale * weight[c, k] * load(density, index[c, k])
                tau[k] = wp.where(x < volume.x_min or i + k >= n, 0.0, softplus(x) * volume.step)
            if wp.static(masked):
                for k in range(L):
                    if not seen(cells, o + float(i + k) * volume.step * d, volume.size):
                        tau[k] = 0.0
            total = float(0.0)
            for k in range(L):
                total += tau[k]
            if not total <= 0.0:  # NaN counts
                if keep != 0:
                    entry = m * entry_stride + r * ray_stride
                    visit_sample[entry] = i
                    visit_T[entry] = T
                    for k in range(L):
                        visit_tau[entry * L + k] = tau[k]
                    m += 1
                for k in range(L // 2):  # half of them: the others lie close by
                    for c in range(4):
                        prefetch_features(color, index[2 * c, 2 * k])
                w = floats()
                for k in range(L):
                    w[k] = one_minus_exp(tau[k])
                for k in range(L):
                    alpha = w[k]
                    w[k] = T * alpha
                    T *= 1.0 - alpha
                for k in range(L):
                    depth += w[k] * (t_min + float(i + k) * volume.step)
                    opacity += w[k]
                    emptiness += log1p(emptiness_scale * w[k])
                for k in range(L):
                    if w[k] > volume.threshold:
                        f = features()
                        for c in range(8):
                            f += weight[c, k] * load_features(color, index[c, k])
                        light += w[k] * to_color(look(f, basis, r))
                if T < T_MIN:
                    break
            i += L
        out_color[r] = light
        out_depth[r] = depth
        out_opacity[r] = opacity
        out_emptiness[r] = emptiness
        if keep != 0:
            n_visits[r] = m

    return march


@functools.cache
def march_backward_kernel(channels: int, n_basis: int, activation: str, lanes: int, exact: bool = False) -> wp.Kernel:
    """Return the kernel that walks back along the visits of a march, and adds up the gradients of the grids.

    With `exact` it adds whole numbers, so that the order of the additions does not matter: each addend is rounded to a
    multiple of 1 / unit.
    """
    floats, ints, L = vector(lanes), wp.types.vector(length=lanes, dtype=wp.int32), wp.constant(lanes)
    place = place_function(lanes)
    features, colors = vector(channels * n_basis), vector(channels)
    load_features, add_rows, add_rows_exact, prefetch_features, prefetch_exact = row_functions(channels * n_basis)
    add_features, prefetch_grad = (add_rows_exact, prefetch_exact) if exact else (add_rows, prefetch_features)
    add_density, number, row = (add_exact, wp.int64, wp.int64) if exact else (add, wp.float32, features)
    look, look_back, to_color, to_color_backward = color_functions(channels, n_basis, activation)

    @wp.kernel(enable_backward=False, module="unique", module_options=OPTIONS)
    def march_backward(
        first: int,
        stride: int,
        rays_o: wp.array(dtype=wp.vec3),
        rays_d: wp.array(dtype=wp.vec3),
        rays_t_min: wp.array(dtype=float),
        volume: Volume,
        d_scale: wp.array(dtype=float),
        color: wp.array(dtype=features),
        basis: wp.array2d(dtype=float),
        emptiness_scale: float,
        entry_stride: int,
        ray_stride: int,
        n_visits: wp.array(dtype=int),
        visit_sample: wp.array(dtype=int),
        visit_T: wp.array(dtype=float),
        visit_tau: wp.array(dtype=float),
        g_color: wp.array(dtype=colors),
        g_depth: wp.array(dtype=float),
        g_opacity: wp.array(dtype=float),
        g_emptiness: wp.array(dtype=float),
        units: wp.array(dtype=float),
        density_grad: wp.array(dtype=number),
        color_grad: wp.array(dtype=row),
        touched: wp.array(dtype=wp.uint8),
    ):
        r = first + wp.tid() * stride
        o = rays_o[r]
        d = rays_d[r]
        t_min = rays_t_min[r]
        g = g_color[r]
        scale = wp.exp(d_scale[0])
        density_unit = float(1.0)
        color_unit = float(1.0)
        if wp.static(exact):
            density_unit = units[0]
            color_unit = units[1]
        behind = float(0.0)  # sum_{j>i} w_j h_j
        for j in range(n_visits[r] - 1, -1, -1):
            entry = j * entry_stride + r * ray_stride
            i = visit_sample[entry]
            T = visit_T[entry]
            index, weight = place(o, d, volume.step, i, volume.size)
            for k in range(L // 2):
                for c in range(4):
                    prefetch_features(color, index[2 * c, 2 * k])
                    prefetch_grad(color_grad, index[2 * c, 2 * k])
            tau = floats()
            w = floats()
            for k in range(L):
                tau[k] = visit_tau[entry * L + k]
                w[k] = one_minus_exp(tau[k])
            T_next = floats()
            for k in range(L):
                alpha = w[k]
                w[k] = T * alpha
                T *= 1.0 - alpha
                T_next[k] = T
            h = floats()
            block = ints()
            for k in range(L):
                h[k] = g_opacity[r] + g_depth[r] * (t_min + float(i + k) * volume.step)
                h[k] = h[k] + g_emptiness[r] * emptiness_scale / (1.0 + emptiness_scale * w[k])
                block[k] = block_number(block_of(o + float(i + k) * volume.step * d), volume.blocks)
            for k in range(L):
                if w[k] > volume.threshold:
                    f = features()
                    for c in range(8):
                        f += weight[c, k] * load_features(color, index[c, k])
                    c_k = to_color(look(f, basis, r))
                    h[k] = h[k] + wp.dot(c_k, g)
                    spread = look_back(to_color_backward(c_k, w[k] * g), basis, r)
                    for c in range(8):
                        add_features(color_grad, index[c, k], weight[c, k] * spread, color_unit)
            g_tau = floats()
            for back in range(L):
                k = L - 1 - back
                g_tau[k] = h[k] * T_next[k] - behind
                behind += w[k] * h[k]
            for k in range(L):  # d tau / d raw = step scale sigmoid(x), and sigmoid(x) = 1 - exp(-softplus(x))
                g_tau[k] = g_tau[k] * volume.step * scale * one_minus_exp(tau[k] / volume.step)
            for k in range(L):
                if tau[k] > 0.0:
                    for c in range(8):
                        add_density(density_grad, index[c, k], weight[c, k] * g_tau[k], density_unit)
                    if load_flag(touched, block[k]) != wp.uint8(FILLED):  # rather than write to what others read
                        touched[block[k]] = wp.uint8(FILLED)

    return march_backward


@functools.cache
def fill_kernel() -> wp.Kernel:
    """Return the kernel that flags the blocks with density as FILLED, the others as EMPTY."""

    @wp.kernel(enable_backward=False, module="unique", module_options=OPTIONS)
    def fill(
        first: int,
        stride: int,
        volume: Volume,
        d_scale: wp.array(dtype=float),
        density: wp.array(dtype=float),
        flags: wp.array(dtype=wp.uint8),
    ):
        b = first + wp.tid() * stride
        block = block_at(b, volume.blocks)
        scale = wp.exp(d_scale[0])
        share = float(1.0)  # beyond their outermost voxels, a negative density rises towards 0
        for axis in range(3):
            if block[axis] == 0 or block[axis] == volume.blocks[axis] - 1:
                share *= EDGE
        x_first = wp.max(block[0] * BLOCK - 1, 0)
        x_end = wp.min((block[0] + 1) * BLOCK, volume.size[0])
        y_end = wp.min((block[1] + 1) * BLOCK, volume.size[1])
        z_end = wp.min((block[2] + 1) * BLOCK, volume.size[2])
        flag = wp.uint8(EMPTY)
        z = wp.max(block[2] * BLOCK - 1, 0)
        while z < z_end and flag == wp.uint8(EMPTY):
            y = wp.max(block[1] * BLOCK - 1, 0)
            while y < y_end and flag == wp.uint8(EMPTY):
                row = (z * volume.size[1] + y) * volume.size[0]
                for x in range(x_first, x_end):
                    raw = load(density, row + x)
                    if not scale * wp.max(raw, share * raw) + volume.shift <= volume.x_min:  # NaN counts
                        flag = wp.uint8(FILLED)
                y += 1
            z += 1
        flags[b] = flag

    return fill


@functools.cache
def spread_kernel() -> wp.Kernel:
    """Return the kernel that tells each block how far the nearest filled one is."""

    @wp.kernel(enable_backward=False, module="unique", module_options=OPTIONS)
    def spread(
        first: int, stride: int, volume: Volume, filled: wp.array(dtype=wp.uint8), flags: wp.array(dtype=wp.uint8)
    ):
        b = first + wp.tid() * stride
        block = block_at(b, volume.blocks)
        flag = int(MAX_JUMP)
        if load_flag(filled, b) == wp.uint8(FILLED):
            flag = FILLED
        distance = int(1)
        while distance < flag:  # the shell of the blocks at this distance, along diagonals too
            for dz in range(-distance, distance + 1):
                for dy in range(-distance, distance + 1):
                    z = block[2] + dz
                    y = block[1] + dy
                    if z >= 0 and z < volume.blocks[2] and y >= 0 and y < volume.blocks[1]:
                        apart = wp.where(wp.max(wp.abs(dz), wp.abs(dy)) == distance, 1, 2 * distance)
                        dx = -distance
                        while dx <= distance:
                            x = block[0] + dx
                            if x >= 0 and x < volume.blocks[0]:
                                near = wp.vec3i(x, y, z)
                                if load_flag(filled, block_number(near, volume.blocks)) == wp.uint8(FILLED):
                                    flag = distance
                            dx += apart
            distance += 1
        flags[b] = wp.uint8(flag)

    return spread


# Operations on one or two grids with `width` floats per voxel, on n neighbouring voxels, of which `first` is the first.
# Floats are counted by size_t, since their number may exceed an int.


def side_by_side(code: str) -> wp.Function:
    """Return a Warp function that runs `code`, in C, for each float k of these voxels, and returns the float `sum`."""

    @wp.func_native(
        "const size_t from = size_t(first) * width, to = from + size_t(n) * width; float sum = 0.0f; "
        f"for (size_t k = from; k < to; ++k) {{ {code} }} return sum;"
    )
    def run(a: wp.array(dtype=float), b: wp.array(dtype=float), first: int, n: int, width: int) -> float: ...

    return run


move = side_by_side("a.data[k] += b.data[k]; b.data[k] = 0.0f;")
dot = side_by_side("sum += a.data[k] * b.data[k];")


@functools.cache
def sweep_kernel(run: wp.Function) -> wp.Kernel:
    """Return the kernel that does `run` to all voxels of touched blocks, and sums what it returns per row of blocks.

    The grids a and b have one float per voxel, and a_features and b_features have `n_features`.
    """

    @wp.kernel(enable_backward=False, module="unique", module_options=OPTIONS)
    def sweep(
        first: int,
        stride: int,
        volume: Volume,
        n_features: int,
        touched: wp.array(dtype=wp.uint8),
        a: wp.array(dtype=float),
        b: wp.array(dtype=float),
        a_features: wp.array(dtype=float),
        b_features: wp.array(dtype=float),
        sums: wp.array(dtype=float),
    ):
        row = first + wp.tid() * stride
        size = volume.size
        total = float(0.0)
        block = wp.vec3i(0, row % volume.blocks[1], row // volume.blocks[1])
        while block[0] < volume.blocks[0]:
            x = block[0] * BLOCK
            while block[0] < volume.blocks[0] and voxels_reached(touched, block, volume.blocks):
                block[0] += 1
            n = wp.min(block[0] * BLOCK, size[0]) - x  # voxels of touched blocks side by side
            if n > 0:
                for z in range(block[2] * BLOCK, wp.min((block[2] + 1) * BLOCK, size[2])):
                    for y in range(block[1] * BLOCK, wp.min((block[1] + 1) * BLOCK, size[1])):
                        v = (z * size[1] + y) * size[0] + x
                        total += run(a, b, v, n, 1) + run(a_features, b_features, v, n, n_features)
            block[0] += 1
        sums[row] = total

    return sweep


@functools.cache
def adam_kernel(channels: int) -> wp.Kernel:
    """Return the kernel of a step of Adam on rows of `channels` values, in flagged blocks; none without `finite`."""
    rows = vector(channels)

    @wp.kernel(enable_backward=False, module="unique", module_options=OPTIONS)
    def adam(
        first: int,
        stride: int,
        volume: Volume,
        flags: wp.array(dtype=wp.uint8),
        finite: wp.array(dtype=wp.bool),
        beta1: float,
        beta2: float,
        rate: float,
        root: float,
        eps: float,
        p: wp.array(dtype=rows),
        g: wp.array(dtype=rows),
        m: wp.array(dtype=rows),
        v: wp.array(dtype=rows),
    ):
        block = block_at(first + wp.tid() * stride, volume.blocks)
        if not finite[0] or not voxels_reached(flags, block, volume.blocks):
            return
        size = volume.size
        for z in range(block[2] * BLOCK, wp.min((block[2] + 1) * BLOCK, size[2])):
            for y in range(block[1] * BLOCK, wp.min((block[1] + 1) * BLOCK, size[1])):
                row = (z * size[1] + y) * size[0]
                for i in range(row + block[0] * BLOCK, row + wp.min((block[0] + 1) * BLOCK, size[0])):
                    gi = g[i]
                    mi = beta1 * m[i] + (1.0 - beta1) * gi
                    vi = beta2 * v[i] + (1.0 - beta2) * wp.cw_mul(gi, gi)
                    m[i] = mi
                    v[i] = vi
                    pi = p[i]
                    for c in range(wp.static(channels)):
                        pi[c] = pi[c] - rate * mi[c] / (wp.sqrt(vi[c]) / root + eps)
                    p[i] = pi

    return adam


@wp.func_native(
    "for (int i = start; i < to; ++i) { const float gi = g.data[i], mi = m.data[i] + rate * (gi - m.data[i]); "
    "const float a = wp::abs(gi) + eps, b = beta2 * u.data[i], ui = a > b ? a : b; "
    "m.data[i] = mi; u.data[i] = ui; p.data[i] -= speed * mi / ui; }"
)
def adamax_on(
    p: wp.array(dtype=float),
    g: wp.array(dtype=float),
    m: wp.array(dtype=float),
    u: wp.array(dtype=float),
    start: int,
    to: int,
    rate: float,
    beta2: float,
    speed: float,
    eps: float,
): ...


@functools.cache
def adamax_kernel() -> wp.Kernel:
    """Return the kernel of a step of Adamax on a row of n floats, `each` per thread; none if `finite` is not 1."""

    @wp.kernel(enable_backward=False, module="unique", module_options=OPTIONS)
    def adamax(
        first: int,
        stride: int,
        n: int,
        each: int,
        rate: float,
        beta2: float,
        speed: float,
        eps: float,
        finite: wp.array(dtype=wp.bool),
        p: wp.array(dtype=float),
        g: wp.array(dtype=float),
        m: wp.array(dtype=float),
        u: wp.array(dtype=float),
    ):
        start = (first + wp.tid() * stride) * each
        if finite[0]:
            adamax_on(p, g, m, u, start, wp.min(start + each, n), rate, beta2, speed, eps)

    return adamax


def x_min(step: float) -> float:
    """Return the x at which softplus(x) step = TAU_MIN."""
    return math.log(math.expm1(TAU_MIN / step))
