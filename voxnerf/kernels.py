"""The fused ray march as Warp kernels: one Python source for CPU and CUDA.

`march` walks each ray once: it skips blocks of cells without density, reads the density
trilinearly, composites, and reads the colour only where it shows. It lists the samples that
mattered. `march_backward` walks that list from the far end and applies, by hand, the chain rule to

    out = sum_i w_i h_i,   w_i = T_i alpha_i,   alpha_i = 1 - exp(-tau_i),   T_i = exp(-sum_{j<i} tau_j),

    d out / d tau_i = h_i T_{i+1} - sum_{j>i} w_j h_j,

h_i being what a sample adds per unit of weight. `voxnerf/reference.py` is the same in plain PyTorch.

Positions are in voxels: 0 is the centre of the first one, x fastest in memory. A cell is the cube
between eight centres; cell c spans the voxels c - 1 and c, so that the border cells 0 and size,
half of which lie outside the grid, are counted too. Grids are zero outside.
"""

import functools
import math

import warp as wp

BLOCK = 4  # cells an edge of a block that is skipped as one
TAU_MIN = 1e-9  # thinner samples are skipped: n of them change nothing by more than n * TAU_MIN
T_MIN = 1e-7  # transmittance at which a ray ends

UNKNOWN, EMPTY, FILLED = 0, 1, 2  # flags of blocks
OPTIONS = {"cpu_compiler_flags": f"{wp.config.cpu_compiler_flags} -ffp-contract=fast"}

vec8 = wp.types.vector(length=8, dtype=wp.float32)
vec5 = wp.types.vector(length=BLOCK + 1, dtype=wp.float32)
vec8i = wp.types.vector(length=8, dtype=wp.int32)


@wp.struct
class Volume:
    """What a march needs to know of a field besides its grids."""

    size: wp.vec3i  # voxels X, Y, Z
    blocks: wp.vec3i  # blocks X, Y, Z
    step: float  # between samples, world units
    shift: float  # of the density before its softplus
    x_min: float  # softplus(x) step < TAU_MIN below it
    threshold: float  # samples whose weight is not above it have no colour


@wp.struct
class Rays:
    """n rays: the position (voxels) s world units beyond the first sample is o + s d."""

    o: wp.array(dtype=wp.vec3)
    d: wp.array(dtype=wp.vec3)
    t_min: wp.array(dtype=float)  # distance of the first sample, world units
    n_samples: wp.array(dtype=int)


@wp.struct
class Visits:
    """The samples of each ray that mattered: entry j of ray r at j * stride + first[r]."""

    sample: wp.array(dtype=int)  # its number i
    tau: wp.array(dtype=float)  # its optical thickness
    T: wp.array(dtype=float)  # the transmittance before it
    n: wp.array(dtype=int)  # (rays,) entries
    first: wp.array(dtype=int)  # (rays,)
    stride: int


# Plain addressing: that of Warp's arrays wraps negative indices and multiplies strides, which in these
# loops costs as much as the arithmetic.


@wp.func_native("return grid.data[i];")
def load(grid: wp.array(dtype=float), i: int) -> float: ...


@wp.func_native("return grid.data[i];")
def load_flag(grid: wp.array(dtype=wp.uint8), i: int) -> wp.uint8: ...


@wp.func_native("wp::atomic_add(grid.data + i, value);")
def add(grid: wp.array(dtype=float), i: int, value: float): ...


@wp.func
def exp_negative(x: float):
    """exp(x) for x <= 0, to 2e-7 relative, inline: a call of the C library would cost more than all else here."""
    y = wp.max(x, -80.0) * 1.4426950408889634
    n = wp.floor(y + 0.5)
    r = (y - n) * 0.6931471805599453
    s = 1.0 + r * (1.0 + r * (1.0 / 2.0 + r * (1.0 / 6.0 + r * (1.0 / 24.0 + r * (1.0 / 120.0 + r * (1.0 / 720.0))))))
    return s * wp.cast((int(n) + 127) << 23, wp.float32)


@wp.func
def log1p_unit(y: float):
    """log(1 + y) for 0 <= y <= 1, to 1e-7 relative: 2 atanh(y / (2 + y))."""
    s = y / (2.0 + y)
    q = s * s
    return 2.0 * s * (1.0 + q * (1.0 / 3.0 + q * (1.0 / 5.0 + q * (1.0 / 7.0 + q * (1.0 / 9.0 + q * (
        1.0 / 11.0 + q * (1.0 / 13.0 + q * (1.0 / 15.0))))))))


@wp.func
def log1p(y: float):
    if y < 0.05:
        return y * (1.0 - y * (1.0 / 2.0 - y * (1.0 / 3.0 - y * (1.0 / 4.0 - y * (1.0 / 5.0)))))
    return wp.log(1.0 + y)


@wp.func
def one_minus_exp(x: float):  # 1 - exp(-x) for x >= 0
    if x > 0.1:
        return 1.0 - exp_negative(-x)
    return x * (1.0 - x * (1.0 / 2.0 - x * (1.0 / 6.0 - x * (1.0 / 24.0 - x * (1.0 / 120.0)))))


@wp.func
def softplus(x: float):
    return wp.max(x, 0.0) + log1p_unit(exp_negative(-wp.abs(x)))


@wp.func
def sigmoid(x: float):
    e = exp_negative(-wp.abs(x))
    s = e / (1.0 + e)
    if x > 0.0:
        s = 1.0 - s
    return s


@wp.func
def sides(x: float, size: int):  # weights of the voxels before and after x, 0 outside the grid
    before = wp.floor(x)
    share = x - before
    low = 1.0 - share
    high = share
    if before < 0.0:
        low = 0.0
    if before > float(size - 2):
        high = 0.0
    return low, high


@wp.func
def corner_weights(p: wp.vec3, size: wp.vec3i):
    x0, x1 = sides(p[0], size[0])
    y0, y1 = sides(p[1], size[1])
    z0, z1 = sides(p[2], size[2])
    a = z0 * y0
    b = z0 * y1
    c = z1 * y0
    d = z1 * y1
    return vec8(a * x0, a * x1, b * x0, b * x1, c * x0, c * x1, d * x0, d * x1)


@wp.func
def corner_indices(p: wp.vec3, size: wp.vec3i):
    ix = int(wp.floor(p[0]))
    iy = int(wp.floor(p[1]))
    iz = int(wp.floor(p[2]))
    x0 = wp.max(ix, 0)
    x1 = wp.min(ix + 1, size[0] - 1)
    y0 = wp.max(iy, 0) * size[0]
    y1 = wp.min(iy + 1, size[1] - 1) * size[0]
    z0 = wp.max(iz, 0) * size[0] * size[1]
    z1 = wp.min(iz + 1, size[2] - 1) * size[0] * size[1]
    a = z0 + y0
    b = z0 + y1
    c = z1 + y0
    d = z1 + y1
    return vec8i(a + x0, a + x1, b + x0, b + x1, c + x0, c + x1, d + x0, d + x1)


@wp.func
def interpolate(grid: wp.array(dtype=float), index: vec8i, weight: vec8):
    a = weight[0] * load(grid, index[0]) + weight[1] * load(grid, index[1])
    b = weight[2] * load(grid, index[2]) + weight[3] * load(grid, index[3])
    c = weight[4] * load(grid, index[4]) + weight[5] * load(grid, index[5])
    d = weight[6] * load(grid, index[6]) + weight[7] * load(grid, index[7])
    return (a + b) + (c + d)


@wp.func
def cell_of(p: wp.vec3):
    return wp.vec3i(int(wp.floor(p[0])) + 1, int(wp.floor(p[1])) + 1, int(wp.floor(p[2])) + 1)


@wp.func
def leave_axis(o: float, d_inverse: float, block: int, size: int):
    """Distance beyond the first sample at which the ray leaves a block, or enters the border cells, along one axis."""
    side = wp.max(block * BLOCK - 1, 0)
    if d_inverse > 0.0:
        side = wp.min((block + 1) * BLOCK, size) - 1
    return (float(side) - o) * d_inverse


@wp.func
def leave_block(o: wp.vec3, d_inverse: wp.vec3, block: wp.vec3i, size: wp.vec3i):
    return wp.min(leave_axis(o[0], d_inverse[0], block[0], size[0]), wp.min(
        leave_axis(o[1], d_inverse[1], block[1], size[1]), leave_axis(o[2], d_inverse[2], block[2], size[2])))


@wp.func
def inverse(d: float):  # of a step along an axis; finite, so that 0 times it is 0
    if wp.abs(d) < 1.0e-20:
        return 1.0e20
    return 1.0 / d


@wp.func
def on_border(cell: wp.vec3i, size: wp.vec3i):
    """Whether a cell reaches outside the grid, where the density is not that of any block."""
    return (cell[0] == 0 or cell[1] == 0 or cell[2] == 0 or cell[0] >= size[0] or cell[1] >= size[1]
            or cell[2] >= size[2])


@wp.func
def largest(density: wp.array(dtype=float), block: wp.vec3i, size: wp.vec3i):
    """The largest voxel that a sample in a block can reach, the zeros outside the grid left out."""
    x0 = wp.max(block[0] * BLOCK - 1, 0)
    y0 = wp.max(block[1] * BLOCK - 1, 0)
    z0 = wp.max(block[2] * BLOCK - 1, 0)
    top = float(-1.0e30)
    if x0 + BLOCK < size[0]:
        row_top = vec5(top, top, top, top, top)  # independent maxima, so that none waits for another
        for z in range(z0, wp.min(z0 + BLOCK + 1, size[2])):
            for y in range(y0, wp.min(y0 + BLOCK + 1, size[1])):
                row = (z * size[1] + y) * size[0] + x0
                row_top = wp.max(row_top, vec5(load(density, row), load(density, row + 1), load(density, row + 2),
                                               load(density, row + 3), load(density, row + 4)))
        return wp.max(row_top)
    for z in range(z0, wp.min(z0 + BLOCK + 1, size[2])):
        for y in range(y0, wp.min(y0 + BLOCK + 1, size[1])):
            for x in range(x0, size[0]):
                top = wp.max(top, load(density, (z * size[1] + y) * size[0] + x))
    return top


@wp.func
def block_number(block: wp.vec3i, blocks: wp.vec3i):
    return (block[2] * blocks[1] + block[1]) * blocks[0] + block[0]


@wp.func
def block_at(b: int, blocks: wp.vec3i):
    return wp.vec3i(b % blocks[0], (b // blocks[0]) % blocks[1], b // (blocks[0] * blocks[1]))


@wp.func
def voxels_reached(flags: wp.array(dtype=wp.uint8), block: wp.vec3i, blocks: wp.vec3i):
    """Whether the BLOCK^3 voxels with a block's numbers are reached from a flagged block: from it or from the next."""
    for dz in range(2):
        for dy in range(2):
            for dx in range(2):
                near = wp.vec3i(wp.min(block[0] + dx, blocks[0] - 1), wp.min(block[1] + dy, blocks[1] - 1),
                                wp.min(block[2] + dz, blocks[2] - 1))
                if load_flag(flags, block_number(near, blocks)) == wp.uint8(FILLED):
                    return True
    return False


@wp.func
def look_up(flags: wp.array(dtype=wp.uint8), density: wp.array(dtype=float), scale: float, block: wp.vec3i,
            volume: Volume):
    """Whether a block may hold a sample thicker than TAU_MIN; found out by the first ray that asks."""
    b = block_number(block, volume.blocks)
    flag = load_flag(flags, b)
    if flag == wp.uint8(UNKNOWN):
        flag = wp.uint8(EMPTY)
        if scale * largest(density, block, volume.size) + volume.shift > volume.x_min:
            flag = wp.uint8(FILLED)
        flags[b] = flag
    return flag == wp.uint8(FILLED)


@functools.cache
def vector(length):
    """Return the type of `length` floats, the same one for the same length."""
    return wp.types.vector(length=length, dtype=wp.float32)


@functools.cache
def row_functions(n_features):
    """Return (load, add) for rows of `n_features` values; see `load` and `add` of single ones."""
    features = vector(n_features)

    @wp.func_native("return grid.data[i];")
    def load_features(grid: wp.array(dtype=features), i: int) -> features: ...

    @wp.func_native("wp::atomic_add(grid.data + i, value);")
    def add_features(grid: wp.array(dtype=features), i: int, value: features): ...

    return load_features, add_features


@functools.cache
def color_functions(channels, n_basis, activation):
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
def march_kernels(channels, n_basis, activation, masked):
    """Return (march, march_backward) of one kind of field; `masked` ones have flags of cells besides blocks."""
    features, colors = vector(channels * n_basis), vector(channels)
    load_features, add_features = row_functions(channels * n_basis)
    look, look_back, to_color, to_color_backward = color_functions(channels, n_basis, activation)

    @wp.func
    def read(grid: wp.array(dtype=features), index: vec8i, weight: vec8):
        a = weight[0] * load_features(grid, index[0]) + weight[1] * load_features(grid, index[1])
        b = weight[2] * load_features(grid, index[2]) + weight[3] * load_features(grid, index[3])
        c = weight[4] * load_features(grid, index[4]) + weight[5] * load_features(grid, index[5])
        d = weight[6] * load_features(grid, index[6]) + weight[7] * load_features(grid, index[7])
        return (a + b) + (c + d)

    @wp.kernel(enable_backward=False, module="unique", module_options=OPTIONS)
    def march(first: int, stride: int, rays: Rays, volume: Volume, scale: wp.array(dtype=float),
              density: wp.array(dtype=float), color: wp.array(dtype=features), basis: wp.array2d(dtype=float),
              blocks: wp.array(dtype=wp.uint8), cells: wp.array(dtype=wp.uint8), emptiness_scale: float, keep: int,
              visits: Visits, out_color: wp.array(dtype=colors), out_depth: wp.array(dtype=float),
              out_opacity: wp.array(dtype=float), out_emptiness: wp.array(dtype=float)):
        r = first + wp.tid() * stride
        o = rays.o[r]
        d = rays.d[r]
        d_inverse = wp.vec3(inverse(d[0]), inverse(d[1]), inverse(d[2]))
        step_inverse = 1.0 / volume.step
        t_min = rays.t_min[r]
        n = rays.n_samples[r]
        light = colors()
        depth = float(0.0)
        opacity = float(0.0)
        emptiness = float(0.0)
        T = float(1.0)
        m = int(0)
        i = int(0)
        while i < n:
            s = float(i) * volume.step
            p = o + s * d
            cell = cell_of(p)
            block = wp.vec3i(cell[0] // BLOCK, cell[1] // BLOCK, cell[2] // BLOCK)
            if not look_up(blocks, density, scale[0], block, volume):
                if wp.static(masked) or not on_border(cell, volume.size):
                    out = leave_block(o, d_inverse, block, volume.size)
                    i = wp.max(i + 1, int(wp.ceil(out * step_inverse)))
                    continue
            i += 1
            if wp.static(masked):
                row = cell[2] * (volume.size[1] + 1) + cell[1]
                if load_flag(cells, row * (volume.size[0] + 1) + cell[0]) == wp.uint8(0):
                    continue
            weight = corner_weights(p, volume.size)
            index = corner_indices(p, volume.size)
            x = scale[0] * interpolate(density, index, weight) + volume.shift
            if x < volume.x_min:
                continue
            tau = softplus(x) * volume.step
            w = T * one_minus_exp(tau)
            if keep != 0:
                entry = m * visits.stride + visits.first[r]
                visits.sample[entry] = i - 1
                visits.tau[entry] = tau
                visits.T[entry] = T
                m += 1
            T -= w
            depth += w * (t_min + s)
            opacity += w
            emptiness += log1p(emptiness_scale * w)
            if w > volume.threshold:
                light += w * to_color(look(read(color, index, weight), basis, r))
            if T < T_MIN:
                break
        out_color[r] = light
        out_depth[r] = depth
        out_opacity[r] = opacity
        out_emptiness[r] = emptiness
        if keep != 0:
            visits.n[r] = m

    @wp.kernel(enable_backward=False, module="unique", module_options=OPTIONS)
    def march_backward(first: int, stride: int, rays: Rays, volume: Volume, scale: wp.array(dtype=float),
                       color: wp.array(dtype=features), basis: wp.array2d(dtype=float), emptiness_scale: float,
                       visits: Visits, g_color: wp.array(dtype=colors), g_depth: wp.array(dtype=float),
                       g_opacity: wp.array(dtype=float), g_emptiness: wp.array(dtype=float),
                       density_grad: wp.array(dtype=float), color_grad: wp.array(dtype=features),
                       touched: wp.array(dtype=wp.uint8)):
        r = first + wp.tid() * stride
        o = rays.o[r]
        d = rays.d[r]
        t_min = rays.t_min[r]
        g = g_color[r]
        behind = float(0.0)  # sum_{j>i} w_j h_j
        j = visits.n[r] - 1
        while j >= 0:
            entry = j * visits.stride + visits.first[r]
            tau = visits.tau[entry]
            s = float(visits.sample[entry]) * volume.step
            j -= 1
            p = o + s * d
            weight = corner_weights(p, volume.size)
            index = corner_indices(p, volume.size)
            cell = cell_of(p)
            block = wp.vec3i(cell[0] // BLOCK, cell[1] // BLOCK, cell[2] // BLOCK)
            touched[block_number(block, volume.blocks)] = wp.uint8(FILLED)
            T = visits.T[entry]
            w = T * one_minus_exp(tau)
            h = g_opacity[r] + g_depth[r] * (t_min + s) + g_emptiness[r] * emptiness_scale / (1.0 + emptiness_scale * w)
            if w > volume.threshold:
                c = to_color(look(read(color, index, weight), basis, r))
                h += wp.dot(c, g)
                spread = look_back(to_color_backward(c, w * g), basis, r)
                for k in range(8):
                    add_features(color_grad, index[k], weight[k] * spread)
            g_tau = h * (T - w) - behind
            behind += w * h
            # softplus' = 1 - exp(-softplus) = 1 - exp(-tau / step)
            g_raw = g_tau * volume.step * one_minus_exp(tau / volume.step) * scale[0]
            for k in range(8):
                add(density_grad, index[k], weight[k] * g_raw)

    return march, march_backward


@functools.cache
def merge_kernel(n_features):
    """Return the kernel that moves one thread's gradient to another's, for rows of `n_features` values."""
    features = vector(n_features)
    load_features, add_features = row_functions(n_features)

    @wp.kernel(enable_backward=False, module="unique", module_options=OPTIONS)
    def merge(first: int, stride: int, volume: Volume, touched: wp.array(dtype=wp.uint8),
              density_grad: wp.array(dtype=float), color_grad: wp.array(dtype=features),
              density_from: wp.array(dtype=float), color_from: wp.array(dtype=features)):
        """Move the gradient of one thread to that of another, block by block, where it was touched."""
        block = block_at(first + wp.tid() * stride, volume.blocks)
        if not voxels_reached(touched, block, volume.blocks):
            return
        size = volume.size
        for z in range(block[2] * BLOCK, wp.min((block[2] + 1) * BLOCK, size[2])):
            for y in range(block[1] * BLOCK, wp.min((block[1] + 1) * BLOCK, size[1])):
                row = (z * size[1] + y) * size[0]
                for v in range(row + block[0] * BLOCK, row + wp.min((block[0] + 1) * BLOCK, size[0])):
                    add(density_grad, v, load(density_from, v))
                    add_features(color_grad, v, load_features(color_from, v))
                    density_from[v] = 0.0
                    color_from[v] = features()

    return merge


@functools.cache
def adam_kernel(channels):
    """Return the kernel of a step of Adam on rows of `channels` values, in flagged blocks."""
    rows = vector(channels)

    @wp.kernel(enable_backward=False, module="unique", module_options=OPTIONS)
    def adam(first: int, stride: int, volume: Volume, flags: wp.array(dtype=wp.uint8), beta1: float, beta2: float,
             rate: float, root: float, eps: float, p: wp.array(dtype=rows), g: wp.array(dtype=rows),
             m: wp.array(dtype=rows), v: wp.array(dtype=rows)):
        block = block_at(first + wp.tid() * stride, volume.blocks)
        if not voxels_reached(flags, block, volume.blocks):
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


def x_min(step):
    """Return the x at which softplus(x) step = TAU_MIN."""
    return math.log(math.expm1(TAU_MIN / step))
