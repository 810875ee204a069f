"""The voxel renderer against reference arrays, hand-computed numbers, oracles and properties."""

import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import pose
from my.errors import UserError
from voxnerf import reference
from voxnerf.field import FIELDS, V_SD, VoxRF, background_uv, make_field
from voxnerf.fused import kernels
from voxnerf.fused.flags import new_flags
from voxnerf.rays import intersect_aabb, pixel_rays, through
from voxnerf.reference import sample_points, sample_weights, weights_from_thickness
from voxnerf.render import pick_march, render_image, render_rays

REFERENCE = Path(__file__).resolve().parent / "reference"
CUBE = [[-1, -1, -1], [1, 1, 1]]
KINDS = {"sd": "V_SD", "sjc": "V_SJC", "nerf_masked": "VoxRF"}


# ---- reference arrays


@pytest.fixture(scope="module", params=[(kind, renderer) for kind in KINDS for renderer in ("fused", "reference")])
def case(request):
    """A reference file, and its field rendered along its rays by each renderer."""
    kind, renderer = request.param
    ref = dict(np.load(REFERENCE / f"vox_a_{kind}.npz"))
    field = make_field(
        KINDS[kind],
        ref["aabb"],
        ref["density"].shape[:1:-1],
        c=ref["color"].shape[1],
        blend_bg_texture="grad_bg" in ref,
        bg_texture_hw=ref["bg"].shape[-1],
        **{k: float(ref[k]) for k in ("step_ratio", "density_shift", "ray_march_weight_thres")},
    )
    with torch.no_grad():
        for name, p in field.named_parameters():
            p.copy_(torch.from_numpy(ref[name]))
    if "alpha_mask" in ref:
        field.update_alpha_mask()
        assert np.array_equal(field.alpha_mask.numpy(), ref["alpha_mask"])
    rays = torch.from_numpy(ref["rays_o"]), torch.from_numpy(ref["rays_d"])
    return ref, field, render_rays(field, *rays, emptiness_scale=10, renderer=renderer)


def weights_of(field, rays_o, rays_d):
    """Compositing weights (n_hit, k) of the rays that meet the box."""
    rays = through(field, rays_o, rays_d)
    _, points, inside = sample_points(field, rays)
    return sample_weights(field, points, inside)[rays.n_samples > 0, : rays.n_samples.max()]


def assert_close(got, want, atol=1e-5):
    np.testing.assert_allclose(got.detach().numpy(), want, rtol=0, atol=atol)


def assert_grads_close(loss, field, ref, suffix=""):
    names = [name for name, _ in field.named_parameters() if f"grad_{name}{suffix}" in ref]
    grads = torch.autograd.grad(loss, [getattr(field, n) for n in names], retain_graph=True)
    assert "density" in names
    for name, grad in zip(names, grads):
        want = ref[f"grad_{name}{suffix}"]
        assert_close(grad, want, atol=1e-5 * np.abs(want).max())
        # relative to each element as well, as far as float32 sums have that many digits
        np.testing.assert_allclose(grad, want, rtol=3e-4, atol=2e-6 * np.abs(want).max())


def test_reference_rays(case):
    ref, field, _ = case
    rays = pixel_rays(int(ref["H"]), int(ref["W"]), ref["K"], ref["c2w"], dtype=torch.float64)
    for got, name in zip(rays, ("rays_o", "rays_d")):
        assert_close(got, ref[name], atol=1e-9)
    t_min, t_max, hits = intersect_aabb(*rays, field.aabb.double())
    assert_close(t_min, ref["t_min"], atol=1e-9)
    assert_close(t_max, ref["t_max"], atol=1e-9)
    assert np.array_equal(hits.numpy(), ref["hits"])


def test_reference_forward(case):
    ref, field, out = case
    hits = torch.from_numpy(ref["hits"])
    assert_close(out.color[hits], ref["color_out"])
    assert_close(out.depth[hits], ref["depth"][:, 0], atol=2e-5)  # the same in float64 is 1.3e-5 away from it
    assert_close(out.opacity[hits], ref["weights"].sum(0))
    w = weights_of(field, *(torch.from_numpy(ref[x]) for x in ("rays_o", "rays_d"))).T
    assert w.shape == ref["weights"].shape and out.n_samples.max() == len(w)
    assert_close(w, ref["weights"])


def test_reference_gradients(case):
    ref, field, out = case
    color = out.color[torch.from_numpy(ref["hits"])]
    assert_grads_close((color * torch.from_numpy(ref["cotangent"])).sum(), field, ref)


def test_reference_emptiness(case):
    ref, field, out = case
    emptiness = out.emptiness.sum() / ref["weights"].size
    assert_close(emptiness, ref["emptiness"], atol=1e-6)
    assert_grads_close(emptiness, field, ref, "_emptiness")


def test_reference_image(case):
    ref, field, out = case
    H, W = int(ref["H"]), int(ref["W"])
    image = render_image(field, ref["K"], ref["c2w"], H, W)
    assert_close(image.color.flatten(1).T, out.color.detach(), atol=1e-5)
    assert_close(image.depth.flatten(), out.depth.detach(), atol=2e-5)


# ---- numbers by hand


def test_weights_by_hand():
    tau = torch.tensor([[math.log(2), math.log(4)]], dtype=torch.float64)
    w = weights_from_thickness(tau)
    np.testing.assert_allclose(w, [[1 / 2, 3 / 8]])


def box_of(density, **kw):
    """A field of 2 x 2 x 2 voxels in CUBE, of edge and step 1, with constant density."""
    field = V_SD(CUBE, 2, c=1, step_ratio=1.0, density_shift=0.0, dtype=torch.float64, **kw)
    with torch.no_grad():
        field.density.fill_(density)
        field.color.copy_(torch.tensor([1.0, 2.0]).expand(1, 1, 2, 2, 2))  # 1 at x < 0, else 2
    return field


def test_two_sample_ray_by_hand():
    # From x = -1.5 along x, y = z = 0.5: the box is met at t = 0.5 (x = -1) and t = 2.5. Samples
    # at x = -1 (half outside: density halves to a, colour 1/2) and x = 0 (density 2a, colour 3/2).
    field = box_of(3.0)
    o, d = torch.tensor([[-1.5, 0.5, 0.5]]).double(), torch.tensor([[1.0, 0.0, 0.0]]).double()
    out = render_rays(field, o, d, bg=8.0)
    tau = [math.log1p(math.exp(1.5)), math.log1p(math.exp(3.0))]
    w = [1 - math.exp(-tau[0]), math.exp(-tau[0]) * (1 - math.exp(-tau[1]))]
    T = math.exp(-sum(tau))
    assert weights_of(field, o, d).flatten().tolist() == pytest.approx(w)
    assert out.emptiness.item() == 0 and render_rays(field, o, d, 8.0, emptiness_scale=10).emptiness.item() == (
        pytest.approx(math.log(1 + 10 * w[0]) + math.log(1 + 10 * w[1]))
    )
    assert out.color.item() == pytest.approx(w[0] * 0.5 + w[1] * 1.5 + T * 8)
    assert out.depth.item() == pytest.approx(w[0] * 0.5 + w[1] * 1.5 + T * 10)
    assert out.opacity.item() == pytest.approx(1 - T)


def test_ray_starting_inside():
    # From the centre of voxel (1, 1, 1) along +x: only half a unit of box is left, one sample
    out = render_rays(box_of(3.0), torch.tensor([[0.5] * 3]), torch.tensor([[1.0, 0.0, 0.0]]), bg=0)
    w = 1 - math.exp(-math.log1p(math.exp(3.0)))
    assert out.n_samples.tolist() == [1] and out.opacity.item() == pytest.approx(w)
    assert out.color.item() == pytest.approx(2 * w)


def test_rays_that_miss():
    o = torch.tensor([[-3.0, 0.2, 0.2], [-3.0, 5.0, 0.0], [3.0, 0.0, 0.0]])
    d = torch.tensor([[1.0, 0.0, 0.0]]).expand(3, 3)  # hits, passes above, points away
    out = render_rays(box_of(3.0), o, d, bg=0.25)
    assert out.opacity[0] > 0.9 and out.opacity[1:].tolist() == [0, 0]
    assert out.depth[1:].tolist() == [10, 10] and out.color[1:].tolist() == [[0.25], [0.25]]
    assert out.n_samples.tolist() == [2, 0, 0]
    out = render_rays(box_of(3.0), o[1:], d[1:], bg=0.25)
    assert out.n_samples.tolist() == [0, 0] and out.color.tolist() == [[0.25], [0.25]]


def test_rays_along_a_face_are_finite():
    o = torch.tensor([[-3.0, 1.0, 0.0], [0.0, 0.0, -3.0], [1.0, 1.0, 1.0], [0.0, 2.0, 0.0]])
    d = torch.tensor([[1.0, 0.0, -0.0], [0.0, -0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    t_min, t_max, hits = intersect_aabb(o, d, torch.tensor(CUBE).float())
    assert t_min.isfinite().all() and t_max.isfinite().all()
    assert t_min[1] == 2 and t_max[1] == 4 and hits[1] and not hits[2] and not hits[3]


def test_subpixels_by_hand():
    # One pixel, 2 x 2 rays at -1/4 and 1/4 around its centre 0; f = 1/2 for 90 degrees
    _, d = pixel_rays(1, 1, pose.intrinsics(1, 1, 90), np.eye(4), subpixels=2, dtype=torch.float64)
    x = d[:, :2] / -d[:, 2:]
    np.testing.assert_allclose(x, [[-0.5, 0.5], [0.5, 0.5], [-0.5, -0.5], [0.5, -0.5]])
    torch_K = torch.as_tensor(pose.intrinsics(1, 1, 90))
    assert torch.equal(pixel_rays(1, 1, torch_K, torch.eye(4), 2)[1], d.float())


def test_background_uv_by_hand():
    d = torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, -1.0]])
    np.testing.assert_allclose(background_uv(d), [[-1, 0], [0, 0], [0, 0.5], [1, 0]], atol=1e-6)


# ---- oracles


def random_field(kind="V_SD", grid_size=(5, 4, 3), c=2, **kw):
    aabb = [[-1, -0.8, -0.6], [1, 0.8, 0.6]]
    g = torch.Generator().manual_seed(1)
    field = make_field(kind, aabb, grid_size, c=c, generator=g, **{"dtype": torch.float64, **kw})
    with torch.no_grad():
        field.density.copy_(2 * torch.randn(field.density.shape, generator=g))
        field.d_scale.fill_(0.2)
    return field


def random_rays(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    o = 1.2 * torch.randn(n, 3, generator=g, dtype=torch.float64)
    towards = torch.randn(n, 3, generator=g, dtype=torch.float64) * 0.6 - o
    return o, F.normalize(towards, dim=-1)


def test_interpolate_at_centres():
    field = random_field()
    sizes = np.array(field.density.shape[:1:-1])  # X, Y, Z
    lo, hi = field.aabb.numpy()
    point = lo + (np.array([3, 2, 1]) + 0.5) * (hi - lo) / sizes
    value = field.density[0, 0, 1, 2, 3] * field.d_scale.exp() - 1
    assert field.sigma(torch.tensor(point)[None]).item() == pytest.approx(F.softplus(value).item())


def march_slowly(field, o, d, bg):
    """One ray, one sample at a time: (color (C,), depth, weights)."""
    (t_min,), (t_max,), _ = intersect_aabb(o[None], d[None], field.aabb)
    T, color, depth, weights = torch.tensor(1.0).double(), 0.0, 0.0, []
    for i in range(10000):
        t = t_min + i * field.step_size
        if t >= t_max:
            break
        p = (o + t * d)[None]
        masked = field.alpha_mask is not None and not field.occupied(p)
        alpha = 0.0 if masked else 1 - torch.exp(-field.sigma(p)[0] * field.step_size)
        weights.append(T * alpha)
        if weights[-1] > field.ray_march_weight_thres:
            color = color + weights[-1] * field.features(p, d[None])[0]
        depth, T = depth + weights[-1] * t, T * (1 - alpha)
    return color + T * bg, depth + T * 10, weights


@pytest.mark.parametrize("kind", FIELDS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("thres", [1e-4, 0.05])
def test_renderer_is_the_slow_one(kind, masked, thres):
    field = random_field(kind, c=3, blend_bg_texture=kind != "VoxRF", ray_march_weight_thres=thres, density_shift=-2.0)
    if masked:
        with torch.no_grad():
            field.density[:, :, :, :, :3] = -20
        field.update_alpha_mask()
        assert 0 < field.alpha_mask.mean() < 1
    rays_o, rays_d = random_rays(25)
    out = render_rays(field, rays_o, rays_d)
    params = list(field.parameters())
    g = torch.Generator().manual_seed(5)
    cotangent = torch.randn(out.color.shape, generator=g, dtype=torch.float64)
    bg = field.background(rays_d)
    slow = [march_slowly(field, *ray) for ray in zip(rays_o, rays_d, bg)]
    color, depth = torch.stack([s[0] for s in slow]), torch.stack([s[1] for s in slow])
    torch.testing.assert_close(out.color, color)
    torch.testing.assert_close(out.depth, depth)
    assert out.n_samples.tolist() == [len(s[2]) for s in slow]
    losses = ((x * cotangent).sum() + y.sum() for x, y in ((out.color, out.depth), (color, depth)))
    for got, want in zip(*(torch.autograd.grad(loss, params) for loss in losses)):
        torch.testing.assert_close(got, want)


def test_gradcheck():
    field = random_field(grid_size=(3, 2, 2), c=2, blend_bg_texture=True, bg_texture_hw=2, ray_march_weight_thres=0.0)
    rays = random_rays(6)
    # gradcheck nudges its inputs in place, and they are the field's own parameters
    assert torch.autograd.gradcheck(
        lambda *_: render_rays(field, *rays, emptiness_scale=10)[:4], tuple(field.parameters())
    )


# ---- the fused renderer is the reference


def both(field, *args, **kw):
    """(rendering, gradients) of a random loss, by the fused renderer and by the reference."""
    results = []
    for renderer in ("fused", "reference"):
        out = render_rays(field, *args, emptiness_scale=10, renderer=renderer, **kw)
        g = torch.Generator().manual_seed(5)
        loss = sum((x * torch.randn(x.shape, generator=g)).sum() for x in out[:4])
        names, params = zip(*field.named_parameters())
        results.append((out, dict(zip(names, torch.autograd.grad(loss, params)))))
    return results


def assert_same(field, fused, reference):
    """To 1e-5, the depth of which 10 is the unit, and gradients to 1e-4 of their largest.

    That of d_scale is a sum of voxel times gradient, whose terms cancel: 1e-6 of their magnitudes on top.
    """
    for name, unit in (("color", 1), ("depth", 10), ("opacity", 1), ("emptiness", 1)):
        got, want = getattr(fused[0], name), getattr(reference[0], name)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * unit, msg=lambda m, name=name: f"{name}: {m}")
    assert torch.equal(fused[0].n_samples, reference[0].n_samples)
    terms = (field.density * reference[1]["density"]).abs().sum().item()
    for name, want in reference[1].items():
        atol = 1e-4 * max(want.abs().max().item(), 1e-6) + (1e-6 * terms if name == "d_scale" else 0)
        torch.testing.assert_close(fused[1][name], want, rtol=0, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


def fused_rays(n=400):
    """Rays of all sorts: from outside, from inside, misses, along the axes."""
    o, d = random_rays(n)
    o[::4] *= 0.3  # many of these start inside
    d[::7] = -d[::7]
    d[:6] = torch.cat([torch.eye(3), -torch.eye(3)])
    return o, d


@pytest.mark.parametrize("kind", FIELDS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "grid_size, layout", [((1, 1, 1), "cpu"), ((2, 9, 3), "cpu"), ((13, 10, 21), "cpu"), ((13, 10, 21), "cuda")]
)
def test_fused_is_reference(kind, masked, grid_size, layout, monkeypatch):
    """Also with what CUDA gets: kernels whose stretches are single samples, and visits that lie apart."""
    for of_device in (kernels.LANES, kernels.STRIDED):
        monkeypatch.setitem(of_device, "cpu", of_device[layout])
    field = random_field(
        kind, grid_size, c=3, blend_bg_texture=kind != "VoxRF", density_shift=-2.0, dtype=torch.float32
    )
    with torch.no_grad():
        field.density[:, :, :, :, 2 * grid_size[0] // 3 :] -= 30  # empty blocks
        if masked:
            field.update_alpha_mask()
    assert_same(field, *both(field, *fused_rays()))


@pytest.mark.parametrize("c", [1, 2, 4, 8, 16, 27])
def test_fused_channels(c):
    field = random_field(c=c, dtype=torch.float32)
    assert_same(field, *both(field, *fused_rays(100), bg=0.5))


@pytest.mark.parametrize("kind", ["V_SD", "VoxRF"])
def test_fused_view_dependence(kind):
    field = random_field(kind, c=3, view_dependent=True, dtype=torch.float32)
    with torch.no_grad():
        field.color.normal_(generator=torch.Generator().manual_seed(3))
    assert_same(field, *both(field, *fused_rays()))


def test_fused_skips_nothing_that_matters():
    """Empty space, a solid ball that ends rays early, thin fog that could still grow: all gradients agree."""
    field = VoxRF(CUBE, 24, density_shift=-4.0)
    z, y, x = torch.meshgrid(*[torch.linspace(-1, 1, 24)] * 3, indexing="ij")
    with torch.no_grad():
        field.density[0, 0] = (100 * (0.6 - (x**2 + y**2 + z**2).sqrt())).clamp(-40, 40)
        field.density[0, 0][x > 0.5] = -8.0  # 6e-6 a unit: thin, but not for ever
    fused, reference = both(field, *fused_rays(2000))
    assert_same(field, fused, reference)
    fog = (x > 0.6) & (x < 0.9)
    got, want = (x[1]["density"][0, 0][fog] for x in (fused, reference))
    assert want.abs().max() > 0
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * want.abs().max().item())


@pytest.mark.parametrize("masked", [False, True])
def test_fused_jumps_over_empty_space_alone(masked, monkeypatch):
    """A few voxels far apart, and at the border: walking through the space between shows nothing else."""
    field = random_field("VoxRF", (60, 50, 45), c=3, density_shift=-2.0, dtype=torch.float32)
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        field.density.copy_(torch.where(torch.rand(field.density.shape, generator=g) < 1e-3, 60.0, -60.0))
        if masked:
            field.update_alpha_mask()
    jumped, _ = both(field, *fused_rays(3000))
    assert 0 < (jumped[0].opacity > 1e-3).float().mean() < 0.9
    monkeypatch.setattr("voxnerf.fused.flags.block_flags", lambda density, *_: torch.zeros_like(new_flags(density)))
    monkeypatch.setattr("voxnerf.fused.flags._mask_flags", {})
    walked, _ = both(field, *fused_rays(3000))
    assert_same(field, jumped, walked)


@pytest.mark.parametrize("renderer", ["fused", "reference"])
def test_nan_shows(renderer):
    field = random_field("VoxRF", (13, 10, 21), c=3, dtype=torch.float32)
    with torch.no_grad():
        field.density[..., 6] = math.nan
    assert render_rays(field, *fused_rays(400), renderer=renderer).color.isnan().any()


def test_fused_channels_first_memory():
    """A colour grid assigned from elsewhere may be laid out in any way."""
    field = random_field(c=3, dtype=torch.float32)
    field.color = torch.nn.Parameter(field.color.detach().contiguous())
    assert_same(field, *both(field, *fused_rays(50), bg=0.0))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_fused_threads_agree(threads, monkeypatch):
    monkeypatch.setattr("voxnerf.fused.launch.MIN_ITEMS", 1)
    field, before = random_field(c=3, dtype=torch.float32), torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        first, again = (both(field, *fused_rays(50), bg=0.0)[0] for _ in range(2))
        assert all(torch.equal(first[1][name], again[1][name]) for name in first[1])  # whatever the threads' timing
        assert_same(field, first, both(field, *fused_rays(50), bg=0.0)[1])
    finally:
        torch.set_num_threads(before)


def test_pick_march():
    single, double = VoxRF(CUBE, 2), VoxRF(CUBE, 2, dtype=torch.float64)
    assert pick_march("reference", single) is not pick_march("fused", single) is pick_march("auto", single)
    assert pick_march("auto", double) is pick_march("reference", double)
    assert pick_march("auto", VoxRF(CUBE, 2, device="meta")) is pick_march("reference", single)
    with pytest.raises(ValueError, match="float64"):
        pick_march("fused", double)
    with pytest.raises(ValueError, match="auto, fused, reference"):
        pick_march("fast", single)


def test_without_warp(monkeypatch, capsys):
    """auto says in one line, once, what is amiss; who asks for the fused renderer is refused."""
    from voxnerf.render import say_slow

    say_slow.cache_clear()
    monkeypatch.setattr("voxnerf.render.start_problem", lambda: "the package warp-lang does not start here: no LLVM")
    field = VoxRF(CUBE, 2)
    for _ in range(2):
        assert pick_march("auto", field) is pick_march("reference", field)
    (line,) = capsys.readouterr().err.splitlines()
    assert "slow renderer" in line and "warp-lang does not start here: no LLVM" in line
    with pytest.raises(UserError, match="--renderer fused: .*warp-lang.*no LLVM; use --renderer reference"):
        pick_march("fused", field)


def test_warp_that_does_not_start(monkeypatch):
    from voxnerf.render import start_problem

    def broken():
        raise OSError("libwarp: wrong ELF class\nand more")

    monkeypatch.setattr("voxnerf.fused.launch.start", broken)
    assert start_problem.__wrapped__() == "the package warp-lang does not start here: libwarp: wrong ELF class"


# ---- properties


@pytest.mark.parametrize("c", range(1, 7))
def test_weights_and_transmittance_sum_to_one(c):
    field = random_field(c=c)
    rays_o, rays_d = random_rays(50)
    out = render_rays(field, rays_o, rays_d, bg=torch.ones(50, c))
    black = render_rays(field, rays_o, rays_d, bg=0.0)
    transmittance = out.color - black.color  # of a white background
    torch.testing.assert_close(out.opacity[:, None] + transmittance, torch.ones(50, c).double())
    w = weights_of(field, rays_o, rays_d)
    torch.testing.assert_close(w.sum(1), out.opacity[out.n_samples > 0])
    assert (w >= 0).all() and out.color.shape == (50, c)


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_chunks_change_nothing(chunk):
    field = random_field(blend_bg_texture=True)
    camera = pose.camera_at(0.3, 1.0)
    args = field, camera.K(4, 5), camera.c2w, 4, 5
    bg = torch.arange(160.0).view(80, 2).double()
    for kw in ({}, {"bg": bg, "subpixels": 2}):
        for got, want in zip(render_image(*args, chunk=chunk, **kw), render_image(*args, **kw)):
            torch.testing.assert_close(got, want)
    assert got.shape[1] <= 80 and render_image(*args, subpixels=2).color.shape == (2, 8, 10)


def test_image_axes():
    # A red dot up and left in the image, seen from +z: grid corner x low, y high
    field = VoxRF(CUBE, 8, density_shift=-10.0)
    with torch.no_grad():
        field.density[:, :, :, 7, 0] = 50
        field.color[0, :, :, 7, 0] = torch.tensor([9.0, -9.0, -9.0])[:, None]
    image = render_image(field, pose.intrinsics(9, 9, 60), pose.look_at((0, 0, 3.0)), 9, 9)
    assert image.color.shape == (3, 9, 9) and image.depth.shape == image.opacity.shape == (9, 9)
    row, column = divmod(image.opacity.argmax().item(), 9)
    assert row < 3 and column < 3
    color = image.color[:, row, column]
    assert color[0] > 0.9 and color[1] < 0.5
    np.testing.assert_allclose(image.color[:, 8, 8].detach(), [1, 1, 1], atol=1e-2)


def test_proportional_grid():
    assert VoxRF([[0, 0, 0], [2, 1, 0.5]], 16).density.shape == (1, 1, 4, 8, 16)
    assert VoxRF(CUBE, (3, 4, 5), c=6).color.shape == (1, 6, 5, 4, 3)
    assert VoxRF([[0, 0, 0], [2, 1, 0.01]], np.int64(16)).density.shape == (1, 1, 1, 8, 16)


@pytest.mark.parametrize("kind, lo, hi, bg", [("VoxRF", 0, 1, 1), ("V_SJC", -1, 1, 0)])
def test_colour_ranges_and_backgrounds(kind, lo, hi, bg):
    field = make_field(kind, CUBE, 2)
    f = torch.tensor([-50.0, 0.0, 50.0])
    assert field.to_color(f).tolist() == pytest.approx([lo, (lo + hi) / 2, hi])
    assert field.background(torch.zeros(2, 3)).tolist() == [[bg] * 3] * 2


def test_alpha_mask_by_hand():
    field = VoxRF(CUBE, 8, density_shift=-10.0)
    with torch.no_grad():
        field.density[0, 0, 4, 4, 4] = 20
    field.update_alpha_mask()
    assert field.alpha_mask.sum() == 27 and field.alpha_mask[0, 0, 3:6, 3:6, 3:6].all()


def test_specks_are_masked():
    """A solid block of 64 voxels, and two floaters of 1 and 2, which touch at a corner: 3 of 67 are 4.5%."""
    field = VoxRF(CUBE, 20, density_shift=-10.0)
    with torch.no_grad():
        field.density[0, 0, 4:8, 4:8, 4:8] = 60
        field.density[0, 0, 15, 15, 15] = field.density[0, 0, 16, 16, 16:18] = 60
    for speck, held in ((0.0, True), (0.044, True), (0.046, False)):
        field.update_alpha_mask(speck)
        assert bool(field.alpha_mask[0, 0, 15, 15, 15]) == held and field.alpha_mask[0, 0, 5, 5, 5] == 1
        assert field.alpha_mask[0, 0, 14:, 14:, 14:].any() == held


@pytest.mark.parametrize("masked", [False, True])
def test_state_round_trip(masked):
    field = random_field("V_SJC", blend_bg_texture=True)
    if masked:
        field.update_alpha_mask()
    copy = random_field("V_SJC", blend_bg_texture=True)
    with torch.no_grad():
        copy.density.zero_()
    copy.load_state_dict(field.state_dict())
    for got, want in zip(render_rays(copy, *random_rays(9)), render_rays(field, *random_rays(9))):
        assert torch.equal(got, want)


def test_same_generator_same_field():
    a, b = (V_SD(CUBE, 4, c=4, generator=torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(a.color, b.color) and a.density.abs().sum() == 0 and a.d_scale == 0


@pytest.mark.parametrize("grid_size", [0, -3, (4, 4), (4, 0, 4)])
def test_bad_grid(grid_size):
    with pytest.raises(ValueError, match="grid_size"):
        VoxRF(CUBE, grid_size)


def test_bad_names_and_boxes():
    with pytest.raises(ValueError, match="VoxRF, V_SJC, V_SD"):
        make_field("NeRF", CUBE, 4)
    with pytest.raises(ValueError, match="aabb"):
        VoxRF([[0, 0, 0], [1, 0, 1]], 4)


# ---- Adam on occupied voxels


@pytest.mark.parametrize("c, view_dependent", [(3, False), (3, True)])
def test_occupied_adam_is_adam(c, view_dependent):
    """Ten steps: the same as PyTorch's where rays can see, and nothing moves elsewhere."""
    from voxnerf.fused.adam import OccupiedAdam

    fields = [
        random_field("VoxRF", (13, 10, 21), c=c, view_dependent=view_dependent, dtype=torch.float32, density_shift=-2.0)
        for _ in range(2)
    ]
    with torch.no_grad():
        for field in fields:
            field.density[:, :, :, :, 6:] -= 30
            field.update_alpha_mask()
    before = {name: p.detach().clone() for name, p in fields[0].named_parameters()}
    mine = OccupiedAdam(fields[0], 0.1, (0.9, 0.99))
    theirs = torch.optim.Adam([{"params": [p]} for p in fields[1].parameters()], 0.1, (0.9, 0.99))
    for _ in range(10):
        for field, step in zip(fields, (partial(mine.step_where, torch.tensor(True)), theirs.step)):
            field.zero_grad()
            render_rays(field, *fused_rays(), renderer="fused").color.square().sum().backward()
            step()
    for (name, got), want in zip(fields[0].named_parameters(), fields[1].parameters()):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3, msg=lambda m, name=name: f"{name}: {m}")
        assert not torch.equal(got, before[name])
    assert torch.equal(fields[0].density[..., 10:], before["density"][..., 10:])
    assert set(mine.state[fields[0].color]) == {"step", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize("renderer", ["auto", "reference"])
def test_the_reference_on_cuda_is_refused_where_bits_must_not_depend_on_timing(renderer, monkeypatch):
    field = random_field(dtype=torch.float32)
    monkeypatch.setattr("voxnerf.render.device_type", lambda field: "cuda")
    monkeypatch.setattr("voxnerf.render.fused_problem", lambda field: "no driver")
    assert pick_march(renderer, field) is reference.march
    monkeypatch.setattr("torch.are_deterministic_algorithms_enabled", lambda: True)
    with pytest.raises(UserError, match="--deterministic True needs the fused renderer on CUDA, and .*; leave one of"):
        pick_march(renderer, field)
